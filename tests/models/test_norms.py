"""The modulated norm, whose derivatives are written out, beside those that follow from the formula."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models.kernels.derivatives import modulate


def plain_modulate(x, shift, scale):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(0.5, 2.0, shape), jnp.float32) for shape in shapes]


def test_modulate_and_its_derivatives_are_those_of_the_formula():
    x, shift, scale, grad = draw((3, 7, 16), (3, 16), (3, 16), (3, 7, 16))
    found, pull = jax.vjp(lambda *a: modulate(*a, jnp.float32), x, shift, scale)
    expected, expected_pull = jax.vjp(plain_modulate, x, shift, scale)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(pull(grad), expected_pull(grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_modulate_keeps_float32_inside_for_bfloat16():
    x, shift, scale, grad = draw((3, 7, 16), (3, 16), (3, 16), (3, 7, 16))
    x, shift, scale, grad = (a.astype(jnp.bfloat16) for a in (x, shift, scale, grad))
    found, pull = jax.vjp(lambda *a: modulate(*a, jnp.bfloat16), x, shift, scale)
    wide = [a.astype(jnp.float32) for a in (x, shift, scale)]
    expected, expected_pull = jax.vjp(plain_modulate, *wide)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)  # one rounding
    for a, b in zip(pull(grad), expected_pull(grad.astype(jnp.float32)), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-4)
