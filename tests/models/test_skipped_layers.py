"""A network without some of its layers is the network that never had them."""

import jax
import numpy as np
import pytest

from dit_jax import DiT, MMDiT

X, T = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32), np.array([3.0, 700.0])


def filled(params):
    """Random numbers everywhere: a gate that is zero would hide a block."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: 0.2 * rng.standard_normal(a.shape, np.float32), params)


def without_row(params, row):
    """The parameters of a DiT without a layer: its row of what is stacked."""
    rest = dict(params)
    rest["blocks"] = jax.tree.map(lambda a: np.delete(a, row, 0), params["blocks"])
    if "adaln" in params:
        adaln = params["adaln"]
        rest["adaln"] = {
            "kernel": np.delete(adaln["kernel"], row, 1),
            "bias": np.delete(adaln["bias"], row, 0),
        }
    return rest


@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention"])
def test_a_dit(conditioning):
    def model(depth):
        return DiT(8, 2, 4, 32, depth, 2, num_classes=3, conditioning=conditioning)

    y = np.array([0, 2])
    params = filled(jax.jit(model(3).init)(jax.random.key(0), X, T, y)["params"])
    expected = jax.jit(model(2).apply)({"params": without_row(params, 1)}, X, T, y)
    for unroll in (False, True):
        skipping = model(3).computed(unroll=unroll).without([1])
        found = jax.jit(skipping.apply)({"params": params}, X, T, y)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    whole = jax.jit(model(3).apply)({"params": params}, X, T, y)
    assert model(3).without([]) == model(3)
    assert np.abs(whole - expected).max() > 1e-2


def test_all_layers_of_an_mmdit_but_the_last():
    """Of every group: dual, joint and last."""
    sizes = dict(input_size=8, in_channels=4, hidden_size=32, num_heads=2, positions_side=8)
    model = MMDiT(depth=4, dual_blocks=1, **sizes)
    condition = {"context": np.ones((2, 3, 16), np.float32), "pooled": np.ones((2, 8), np.float32)}
    params = filled(jax.jit(model.init)(jax.random.key(0), X, T, condition)["params"])
    one = MMDiT(depth=1, **sizes)
    last = {name: leaf for name, leaf in params.items() if not name.startswith(("dual_", "joint_"))}
    expected = jax.jit(one.apply)({"params": last}, X, T, condition)
    found = jax.jit(model.without([2, 0, 1]).apply)({"params": params}, X, T, condition)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    other = jax.jit(model.without([3]).apply)({"params": params}, X, T, condition)
    assert np.abs(other - found).max() > 1e-2
