"""How a network is computed, and what it is made of: plainly, in forward mode, with other parts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import DiT
from dit_jax.models.compute import Compute
from dit_jax.models.layers import layers
from dit_jax.models.linear import Linear
from dit_jax.models.norms import AffineNorm
from dit_jax.models.parts import Norm, Parts

TINY = dict(
    input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=5
)  # fmt: skip
CONDITIONINGS = ("in_context", "cross_attention", "adaln", "adaln_zero")
HAND_WRITTEN = ("custom_vjp", "pallas_call", "platform_index")


def draw(seed=0, n=3):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 8, 8, 4), np.float32)
    return x, np.array([3.0, 400.0, 999.0], np.float32)[:n], np.arange(n, dtype=np.int32)


def random_params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *draw())["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_forward_mode_of_a_plain_network_is_the_limit_of_differences(conditioning, dtype):
    """In bfloat16 differences are mostly rounding: there it is compared with the derivative in float32."""
    model = DiT(**TINY, conditioning=conditioning).plain().computed(dtype=dtype)
    params, (x, t, y) = random_params(model), draw()
    dx, dt = draw(seed=2)[0], np.array([1.0, -1.0, 0.5], np.float32)

    def velocity(model):
        def function(x, t):
            return model.apply({"params": params}, x, t, y)

        return jax.jit(lambda *a: jax.jvp(function, a[:2], a[2:]))(x, t, dx, dt)

    out, along = velocity(model)
    assert float(jnp.abs(along).max()) > 1e-2
    if dtype == jnp.bfloat16:
        expected = velocity(model.computed(dtype=jnp.float32))[1]
        assert float(jnp.linalg.norm(along - expected) / jnp.linalg.norm(expected)) < 0.2
        return

    def difference(step):
        forward, back = (model.apply({"params": params}, x + s * dx, t + s * dt, y) for s in (step, -step))
        return (forward - back) / (2 * step)

    differences = (4 * difference(2.0**-7) - difference(2.0**-6)) / 3  # without the error of the second order
    error = float(jnp.linalg.norm(along - differences) / jnp.linalg.norm(differences))
    assert error < 2e-3
    np.testing.assert_allclose(out, model.apply({"params": params}, x, t, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"norm_kernel": "pallas"}, {"attention": "tokens_last"}, {"quantization": "fp8"}]
)
def test_a_plain_network_has_nothing_written_by_hand(options):
    model = DiT(**TINY).computed(**options, dtype=jnp.bfloat16)
    params, inputs = random_params(model.plain()), draw()
    program, plain = (
        str(jax.make_jaxpr(m.apply)({"params": params}, *inputs)) for m in (model, model.plain())
    )
    assert any(name in program for name in HAND_WRITTEN)
    assert not any(name in plain for name in HAND_WRITTEN)
    with pytest.raises(TypeError, match="apply forward-mode autodiff"):
        jax.jvp(
            lambda t: model.apply({"params": params}, inputs[0], t, inputs[2]), (inputs[1],), (inputs[1],)
        )


def test_a_plain_network_is_the_same_network():
    model = DiT(**TINY)
    params, inputs = random_params(model), draw()

    def value_and_grad(model):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, *inputs)))))(
            params
        )

    found, expected = value_and_grad(model), value_and_grad(model.plain())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, expected)


# ------------------------------------------------------------------------------------------------ parts


def rms(x):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


class Gated(nn.Module):
    """A SwiGLU."""

    hidden: int
    compute: Compute

    @nn.compact
    def __call__(self, x):
        both = Linear((2, self.hidden), compute=self.compute, name="fc1")(x)
        return Linear((x.shape[-1],), compute=self.compute, name="fc2")(
            nn.silu(both[..., 0, :]) * both[..., 1, :]
        )


def turned(q, k):
    """Rotations by position of the two halves of each head, of normed queries and keys."""
    angle = jnp.arange(q.shape[1], dtype=jnp.float32)[None, :, None, None]

    def rotate(x):
        a, b = jnp.split(rms(x), 2, axis=-1)
        return jnp.concatenate(
            [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], -1
        )

    return rotate(q), rotate(k)


def nowhere(rows, columns, width):
    return np.zeros((rows * columns, width), np.float32)


PARTS = {
    "norm": Parts(norm=Norm(rms, AffineNorm)),
    "mlp": Parts(mlp=Gated),
    "positions": Parts(positions=nowhere),
    "queries_keys": Parts(queries_keys=turned),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_takes_the_place_of_another_without_a_change_of_the_blocks(part):
    usual, other = DiT(**TINY), DiT(**TINY, parts=PARTS[part])
    params, inputs = random_params(other), draw()
    found = other.apply({"params": params}, *inputs)
    assert np.all(np.isfinite(found))
    if part == "mlp":
        assert params["blocks"]["mlp"]["fc1"]["kernel"].shape == (2, 32, 2, 128)
        return
    assert float(jnp.abs(found - usual.apply({"params": params}, *inputs)).max()) > 1e-2


def test_attention_without_a_place_for_a_part_gives_way_to_one_that_has_it():
    model = DiT(**TINY, parts=PARTS["queries_keys"])
    params, inputs = random_params(model), draw()
    found, expected = (
        model.computed(attention=kernel).apply({"params": params}, *inputs)
        for kernel in ("tokens_last", "einsum")
    )
    np.testing.assert_array_equal(found, expected)


# ----------------------------------------------------------------------------------------------- layers


class Exchange(nn.Module):
    """Two streams that add a part of each other, each layer with its own vector and a shared one."""

    @nn.compact
    def __call__(self, streams, own, shared):
        scale = self.param("scale", nn.initializers.ones, ())
        left, right = streams["left"], streams["right"]
        return {"left": left + scale * own["to_left"] * right, "right": right + shared * left}, None


@pytest.mark.parametrize("options", [{}, {"unroll": True}, {"remat": "full"}])
def test_layers_carry_trees(options):
    streams = {"left": jnp.ones(2), "right": jnp.array([1.0, 2.0])}
    own = {"to_left": jnp.array([1.0, 3.0, 5.0])}
    loop = layers(Exchange, 3, Compute(**options))()
    params = loop.init(jax.random.key(0), streams, own, 0.5)
    assert params["params"]["scale"].shape == (3,)
    found, _ = loop.apply(params, streams, own, 0.5)
    for scale in (1.0, 3.0, 5.0):
        streams = {
            "left": streams["left"] + scale * streams["right"],
            "right": streams["right"] + 0.5 * streams["left"],
        }
    jax.tree.map(np.testing.assert_allclose, found, streams)
