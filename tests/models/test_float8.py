"""8-bit products: near the exact ones, exact where the formats are, never silent, and only where asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax import DiT
from dit_jax.config import ComputeConfig, Config, ConfigError, MeshConfig, ModelConfig, resolve
from dit_jax.models.kernels import float8
from dit_jax.training.program import build_program
from dit_jax.training.sharding import make_mesh

E4M3, E5M2 = 2.0**-4, 2.0**-3  # largest relative rounding error of a normal number: 3 and 2 bits of mantissa
TINY = dict(
    input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=4, num_classes=5,
)  # fmt: skip
SHAPES = {1: ((64, 48), (48, 3, 16), (64, 3, 16)), 2: ((64, 4, 12), (4, 12, 32), (64, 32))}


@functools.partial(jax.jit, static_argnums=3)
def product_and_gradients(x, kernel, grad, in_axes):
    out, backward = jax.vjp(lambda x, kernel: float8.dot(x, kernel, in_axes), x, kernel)
    return out, *backward(grad)


def exact(x, kernel, grad, in_axes):
    """The same in float64, and the same of magnitudes: an error bound is a share of it."""
    arrays = [np.asarray(a, np.float64) for a in (x, kernel, grad)]

    def three(x, kernel, grad):
        outputs = grad.ndim - 1
        out = np.tensordot(x, kernel, in_axes)
        return (
            out,
            np.tensordot(grad, kernel, (range(1, grad.ndim), range(-outputs, 0))),
            np.tensordot(x, grad, (0, 0)),
        )

    return zip(three(*arrays), three(*map(np.abs, arrays)), strict=True)


def operands(in_axes, dtype=np.float32, seed=0, scales=(300.0, 0.02, 1e-7)):
    rng = np.random.default_rng(seed)
    arrays = (rng.normal(size=shape) * s for shape, s in zip(SHAPES[in_axes], scales, strict=True))
    return [jnp.asarray(a, dtype) for a in arrays]


@pytest.mark.parametrize("in_axes", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_errors_are_those_of_the_formats(in_axes, dtype):
    arrays = operands(in_axes, dtype)
    found = product_and_gradients(*arrays, in_axes)
    written = {"float32": 1e-6, "bfloat16": 2.0**-8}[dtype]
    units = (E4M3, E5M2, E5M2)
    for got, (expected, magnitude), unit in zip(found, exact(*arrays, in_axes), units, strict=True):
        assert got.dtype == dtype and got.shape == expected.shape
        error = np.asarray(got, np.float64) - expected
        # The worst case of one product, and a hundredth for elements that are subnormal after scaling.
        worst = (1 + unit) * (1 + E4M3) - 1 + written + 0.01
        assert np.all(np.abs(error) <= worst * magnitude)
        relative = np.linalg.norm(error) / np.linalg.norm(expected)
        assert unit / 8 < relative < unit  # errors average out, and are there: nothing wider was multiplied


def test_powers_of_two_are_exact():
    rng = np.random.default_rng(1)
    arrays = [
        jnp.asarray(rng.choice([-1.0, 1.0], shape) * 2.0 ** rng.integers(low, low + 6, shape), jnp.float32)
        for shape, low in zip(SHAPES[1], (5, -9, -30), strict=True)
    ]
    for got, (expected, _) in zip(product_and_gradients(*arrays, 1), exact(*arrays, 1), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", [float8.E4M3, float8.E5M2])
@pytest.mark.parametrize("largest", [1e-12, 0.875, 0.99, 1.0, 448.0, 500.0, 1e30])
def test_the_largest_element_uses_the_whole_range(dtype, largest):
    x = jnp.asarray([largest / 3, -largest, 0.0], jnp.float32)
    q, scale = float8.quantize(x, dtype)
    top = float(jnp.finfo(dtype).max)
    assert q.dtype == dtype and top / 2 <= -float(q[1]) <= top
    assert np.frexp(float(scale))[0] == 0.5  # a power of two
    unit = E4M3 if dtype == float8.E4M3 else E5M2
    np.testing.assert_allclose(np.asarray(q, np.float32) * scale, x, rtol=unit)


def test_zeros_give_zeros():
    x, kernel, grad = operands(1)
    for arrays in ((0 * x, kernel, grad), (x, 0 * kernel, grad), (x, kernel, 0 * grad)):
        for got, (expected, _) in zip(product_and_gradients(*arrays, 1), exact(*arrays, 1), strict=True):
            assert np.all(np.isfinite(got)) and np.any(got) == np.any(expected)


def test_numbers_too_small_to_scale_up_become_zeros():
    q, scale = float8.quantize(jnp.asarray([2e-38, 0.0], jnp.float32), float8.E4M3)
    assert not np.any(np.asarray(q, np.float32)) and np.isfinite(scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_every_result_that_it_reaches(bad):
    arrays = operands(1)
    for dtype in (float8.E4M3, float8.E5M2):  # by its scale, as a GPU's conversion may saturate
        assert np.isnan(float8.quantize(jnp.asarray([1.0, bad], jnp.float32), dtype)[1])
    reached = [(0, 2), (0, 1), (1, 2)]  # by x, kernel and gradient: of product, gradient of x, of the kernel
    for i, results in enumerate(reached):
        broken = list(arrays)
        broken[i] = arrays[i].at[3, 2].set(bad)
        found = product_and_gradients(*broken, 1)
        assert [bool(np.all(np.isfinite(a))) for a in found] == [j not in results for j in range(3)]


def test_the_rest_of_the_batch_does_not_change_a_row():
    x, kernel, _ = operands(1)
    x = jnp.sign(x) * (100 + jnp.abs(x) % 100)
    # Numbers of few bits, whose sums are exact in any order: a processor may add differently for other shapes.
    kernel = jnp.sign(kernel) * (1 + 50 * jnp.abs(kernel) % 1)
    alone = float8.dot(x[:32], kernel)
    beside = float8.dot(jnp.concatenate([x[:32], 16 * x[32:]]), kernel)[:32]
    np.testing.assert_array_equal(beside, alone)


def test_eight_devices_agree_with_one():
    arrays = operands(1)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    placed = [jax.device_put(a, s) for a, s in zip(arrays, (split, whole, split), strict=True)]
    found, expected = product_and_gradients(*placed, 1), product_and_gradients(*arrays, 1)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def batch(n=4, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(n, 8, 8, 4)), jnp.float32)
    return x, jnp.asarray(rng.integers(0, 1000, n), jnp.int32), jnp.asarray(rng.integers(0, 5, n), jnp.int32)


def squared_error(model):
    x, t, y = batch()
    return lambda params: jnp.mean((model.apply({"params": params}, x, t, y)[..., :4] - x) ** 2)


def products(model):
    """How often the program for CUDA multiplies each pair of element types, forward and backward."""
    params = jax.eval_shape(model.init, jax.random.key(0), *batch())["params"]
    traced = jax.jit(jax.grad(squared_error(model))).trace(params)
    lines = [line for line in traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
             if "stablehlo.dot_general" in line]  # fmt: skip
    forward = sum(line.count("f8E4M3FN>") == 2 for line in lines)
    backward = sum("f8E4M3FN>" in line and "f8E5M2>" in line for line in lines)
    return {"forward": forward, "backward": backward, "other": len(lines) - forward - backward}


@pytest.mark.parametrize("conditioning", ["in_context", "cross_attention", "adaln", "adaln_zero"])
def test_the_four_large_products_and_no_others_are_in_8_bits(conditioning):
    model = DiT(**TINY, conditioning=conditioning).computed(dtype=jnp.bfloat16, attention="einsum")
    plain, quantized = products(model), products(model.computed(quantization="fp8"))
    assert plain["forward"] == plain["backward"] == 0
    assert quantized == {"forward": 4, "backward": 8, "other": plain["other"] - 12}
    # What a remat policy keeps of a linear layer is not multiplied again.
    assert products(model.computed(quantization="fp8", remat="dots_attention"))["forward"] == 4
    assert products(model.computed(quantization="fp8", remat="full"))["forward"] > 4


@pytest.mark.slow
def test_a_tiny_network_learns_as_without():
    def losses(quantization):
        model = DiT(**TINY).computed(quantization=quantization, attention="einsum")
        optimizer = optax.adam(3e-3)
        objective = squared_error(model)
        params = DiT(**TINY).init(jax.random.key(0), *batch())["params"]

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(objective)(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=40)[1])(params)

    plain, quantized = losses("none"), losses("fp8")
    assert float(quantized[-1]) < 0.1 * float(quantized[0])
    np.testing.assert_allclose(quantized[:30], plain[:30], rtol=0.1)
    assert float(jnp.abs(quantized - plain).max()) > 0


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="quantization is 'int8'; expected none or fp8"):
        DiT(**TINY).computed(quantization="int8")
    sizes = dict(name="DiT-S/2", input_size=(8, 8), depth=2, hidden_size=32, num_heads=4)
    compute = ComputeConfig(quantization="fp8", attention="tokens_last")
    config = resolve(Config(model=ModelConfig(**sizes), compute=compute))
    with pytest.raises(ConfigError, match="quantization is fp8 with attention tokens_last"):
        build_program(config, make_mesh(MeshConfig()), scaling_factor=1.0, shift_factor=0.0)
    config = resolve(Config(model=ModelConfig(**sizes), compute=ComputeConfig(attention="cudnn")))
    with pytest.raises(ConfigError, match="attention is cudnn on a cpu in float32 with 8 channels a head"):
        build_program(config, make_mesh(MeshConfig()), scaling_factor=1.0, shift_factor=0.0)
