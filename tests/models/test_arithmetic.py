"""Multiply-accumulates are counted through everything that a network is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dit_jax.models.arithmetic import count_macs, modulated

X, W = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 4), (4, 4)))
ONE = 8 * 4 * 4  # MACs of x @ w


@jax.custom_vjp
def by_hand(x, w):
    return x @ w


by_hand.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, grad: (grad @ saved[1].T, saved[0].T @ grad))


@jax.custom_jvp
def by_hand_forward(x, w):
    return x @ w


by_hand_forward.defjvp(lambda given, tangents: (given[0] @ given[1], tangents[0] @ given[1]))


def over_devices(x, w):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(split, whole), out_specs=split)(x, w)


def nested(x, w):
    @jax.checkpoint
    def layer(x, _):
        return jax.lax.scan(lambda x, _: (jax.jit(by_hand)(x, w), None), x, length=3)

    return jax.lax.scan(layer, x, length=5)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (jnp.matmul, ONE),
        (lambda x, w: jnp.einsum("nd,df->fn", x, w) + 1.0, ONE),
        (lambda x, w: jnp.einsum("nd,md->nm", x, x), 8 * 8 * 4),
        (lambda x, w: jnp.einsum("bnd,bmd->bnm", x[None], x[None]), 8 * 8 * 4),
        (jax.jit(jnp.matmul), ONE),
        (jax.checkpoint(jnp.matmul), ONE),
        (by_hand, ONE),
        (by_hand_forward, ONE),
        (over_devices, ONE),
        (nested, 15 * ONE),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w), 2 * ONE),
        (lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x), 3 * ONE),
        (lambda x, w: modulated(x) + 1.0, 32),
        (lambda x, w: jax.lax.scan(lambda x, _: (modulated(x * 2.0), None), x, length=7), 7 * 32),
        (lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x - 1.0, x @ w), ONE),
        (lambda x, w: jnp.exp(x).sum(), 0),
    ],
)
def test_products_are_counted_wherever_they_are(function, expected):
    assert count_macs(function, X, W) == expected


def convolution(x, w):
    return jax.lax.conv_general_dilated(x[None, None], w[None, None], (1, 1), "SAME")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x),
            "products are in a while loop, .*; expected a scan",
        ),
        (convolution, "conv_general_dilated is a convolution: its multiply-accumulates cannot be counted"),
    ],
)
def test_what_cannot_be_counted_is_an_error(function, message):
    with pytest.raises(ValueError, match=message):
        count_macs(function, X, W)
