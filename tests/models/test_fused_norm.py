"""The fused norm beside the formula, in interpret mode; and what a GPU would run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from dit_jax.config import ComputeConfig, Config, ConfigError, MeshConfig, ModelConfig, resolve
from dit_jax.models.create import build_model
from dit_jax.models.kernels import fused_norm
from dit_jax.models.kernels.fused_norm import gate_residual_modulate
from dit_jax.models.norms import add_gated
from dit_jax.training.sharding import batch_sharding, make_mesh

TINY = ModelConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=(6, 6), num_classes=3)
PALLAS = ComputeConfig(norm_kernel="pallas")


def formula(x, branch, gate, shift, scale):
    if branch is not None:
        x = add_gated(x, branch, gate)
    normal = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x, normal * (1 + scale[:, None, :]) + shift[:, None, :]


def draw(b, n, d, terms="gate", dtype=jnp.float32):
    """Arguments of the function and gradients of its two results."""
    rng = np.random.default_rng(b + n + d)
    tokens = [jnp.asarray(rng.normal(0.5, 2.0, (b, n, d)), dtype) for _ in range(4)]
    gate, shift, scale = (jnp.asarray(rng.normal(0.5, 1.0, (b, d)), dtype) for _ in range(3))
    branch, gate = (None if terms == "none" else tokens[1]), (gate if terms == "gate" else None)
    return (tokens[0], branch, gate, shift, scale), tuple(tokens[2:])


def with_gradients(function):
    """(arguments, gradients of the results) -> (results, gradients of the arguments)."""

    def both(arguments, grads):
        results, pull = jax.vjp(function, *arguments)
        return results, pull(grads)

    return both


def fused(dtype=jnp.float32, sharding=None):
    return with_gradients(lambda *a: gate_residual_modulate(*a, dtype, sharding))


# 36 = 32 + 4, 33 tokens are 3 x 11, 37 are prime: one program each.
@pytest.mark.parametrize(
    ("shape", "terms"),
    [
        ((2, 33, 36), "gate"), ((1, 64, 36), "gate"), ((1, 37, 8), "gate"), ((1, 4, 1152), "gate"),
        ((2, 6, 36), "branch"), ((2, 6, 36), "none"), ((1, 3, 7), "gate"),
    ],
)  # fmt: skip
def test_results_and_gradients_are_those_of_the_formula(shape, terms):
    found = jax.jit(fused())(*draw(*shape, terms))
    expected = jax.jit(with_gradients(formula))(*draw(*shape, terms))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * float(np.abs(b).max()))


def test_bfloat16_is_rounded_once():
    arguments, grads = draw(2, 9, 36, dtype=jnp.bfloat16)
    (total, y), of_arguments = jax.jit(fused(jnp.bfloat16))(arguments, grads)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (arguments, grads))
    (wide_total, _), _ = with_gradients(formula)(*wide)
    np.testing.assert_array_equal(total, wide_total.astype(jnp.bfloat16))
    # The norm is that of the stream as it was rounded.
    x, branch, gate, shift, scale = wide[0]
    rest = total.astype(jnp.float32) - add_gated(x, branch, gate)
    (_, wide_y), wide_of_arguments = with_gradients(formula)((x + rest, branch, gate, shift, scale), wide[1])
    for a, b in zip((y, *of_arguments), (wide_y, *wide_of_arguments), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-4)


def test_a_constant_token_has_no_gradient_that_is_not_finite():
    (x, branch, gate, shift, scale), grads = draw(1, 4, 36)
    flat = (jnp.ones_like(x), jnp.ones_like(branch), jnp.ones_like(gate), shift, scale)
    results, of_arguments = fused()(flat, grads)
    np.testing.assert_allclose(results[1], jnp.broadcast_to(shift[:, None, :], x.shape), atol=1e-6)
    assert all(np.isfinite(a).all() for a in of_arguments)


@pytest.mark.parametrize("axes", [("data",), ("data", "fsdp")])
def test_devices_work_on_their_own_images(axes):
    mesh = Mesh(
        np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    arguments = draw(8, 6, 36)
    split = jax.device_put(arguments, sharding)
    compiled = jax.jit(fused(sharding=sharding)).lower(*split).compile()
    for a, b in zip(*map(jax.tree.leaves, (compiled(*split), jax.jit(fused())(*arguments))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(np.abs(b).max()))
    assert all(a.sharding.is_equivalent_to(sharding, a.ndim) for a in jax.tree.leaves(compiled(*split)))
    text = compiled.as_text()
    assert "all-gather" not in text and "all-reduce" not in text


def loss_and_gradient(config, params, preset=None):
    mesh = None if preset is None else make_mesh(MeshConfig(preset=preset))
    model = build_model(config, None if mesh is None else batch_sharding(mesh))
    rng = np.random.default_rng(1)
    x, target = rng.standard_normal((2, 8, *config.model.input_size, 4), np.float32)
    t, y = np.arange(8, dtype=np.int32) * 100, np.arange(8, dtype=np.int32) % 3

    def loss(p, x):
        out = model.apply({"params": p}, x, t, y)
        return jnp.mean(jnp.square(out[..., :4] - target))

    if mesh is not None:
        x = jax.device_put(x, batch_sharding(mesh))
    return jax.jit(jax.value_and_grad(loss))(params, x)


def random_params(config):
    model = build_model(dataclasses.replace(config, compute=ComputeConfig()))
    x, t = jnp.zeros((1, *config.model.input_size, 4)), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t, t)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.mark.parametrize(
    ("conditioning", "options", "preset"),
    [
        ("adaln_zero", {}, None), ("adaln", {"unroll": True}, None),
        ("adaln_zero", {"remat": "dots_attention"}, "fsdp_tensor"),
    ],
)  # fmt: skip
def test_a_model_has_the_same_loss_and_gradient(conditioning, options, preset):
    compute = ComputeConfig(norm_kernel="pallas", **options)
    config = resolve(Config(model=dataclasses.replace(TINY, conditioning=conditioning), compute=compute))
    plain = dataclasses.replace(config, compute=dataclasses.replace(compute, norm_kernel="xla"))
    params = random_params(config)
    loss, grads = loss_and_gradient(config, params, preset)
    expected_loss, expected = loss_and_gradient(plain, params)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert float(np.abs(grads["blocks"]["attn"]["qkv"]["kernel"]).max()) > 0
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(b).max()))


def test_a_gpu_gets_one_kernel_for_each_direction():
    arguments, grads = draw(2, 256, 1152, dtype=jnp.bfloat16)
    # Later versions of JAX ask what the GPU is.
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        lowered = jax.jit(fused(jnp.bfloat16)).trace(arguments, grads).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("triton") == 2
    assert "while" not in lowered.as_text()  # the interpreter's loop over programs


@pytest.mark.parametrize(("n", "most", "expected"), [(256, 32, 32), (289, 32, 17), (37, 32, 1), (5, 8, 5)])
def test_tokens_of_a_program_divide_those_of_an_image(n, most, expected):
    assert fused_norm._tokens(n, most) == expected


@pytest.mark.parametrize("width", [1, 36, 384, 1151, 1152])
def test_a_row_is_cut_into_powers_of_two(width):
    pieces = fused_norm._pieces(width)
    assert [p.start for p in pieces] == np.cumsum([0, *(p.size for p in pieces)])[:-1].tolist()
    assert sum(p.size for p in pieces) == width and all(p.size.bit_count() == 1 for p in pieces)


def test_what_it_cannot_serve_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"--compute.norm-kernel is pallas; expected xla, .* in_context"):
        resolve(Config(model=dataclasses.replace(TINY, conditioning="in_context"), compute=PALLAS))
    with pytest.raises(
        ConfigError, match=r"--compute.norm-kernel is pallas; expected xla, .* cross_attention"
    ):
        fused_norm.check_norm_kernel("pallas", "cross_attention")
    with pytest.raises(ConfigError, match="'cuda'; expected xla or pallas"):
        fused_norm.check_norm_kernel("cuda", "adaln")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ConfigError, match="for GPUs"):
        fused_norm.check_norm_kernel("pallas", "adaln_zero")
    fused_norm.check_norm_kernel("xla", "in_context")
