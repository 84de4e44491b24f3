"""Products in bfloat16 with float32 parameters: gradients keep their digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models.kernels.products import add_bias, product

SHAPES = {  # equation -> shapes of x and kernel
    "td,df->tf": ((40, 8), (8, 12)),
    "bnd,dh->bnh": ((2, 20, 8), (8, 12)),
    "hbkn,hkd->bnd": ((2, 3, 4, 20), (2, 4, 12)),
    "bd,dlv->blv": ((40, 8), (8, 3, 4)),
}


def arrays(equation, dtype):
    """x in `dtype`, a kernel that is not representable in it, and a gradient of the product in `dtype`."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SHAPES[equation])
    x = x.astype(dtype)
    grad = rng.normal(size=jax.eval_shape(lambda: product(x, kernel, equation)).shape)
    return x, kernel, jnp.asarray(grad, dtype)


@pytest.mark.parametrize("equation", SHAPES)
def test_a_kernels_gradient_is_the_float32_sum(equation):
    x, kernel, grad = arrays(equation, jnp.bfloat16)
    out, backward = jax.jit(lambda *a: jax.vjp(lambda x, k: product(x, k, equation), *a))(x, kernel)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, jnp.einsum(equation, x, kernel.astype(jnp.bfloat16)))
    of_x, of_kernel = backward(grad)
    assert of_x.dtype == jnp.bfloat16 and of_kernel.dtype == jnp.float32
    operands, _, of_out = equation.partition("->")
    a, b = operands.split(",")
    exact = np.einsum(f"{a},{of_out}->{b}", *(np.asarray(v, np.float64) for v in (x, grad)))
    np.testing.assert_allclose(of_kernel, exact, rtol=1e-5, atol=1e-5)
    exact = np.einsum(
        f"{of_out},{b}->{a}", *(np.asarray(v.astype(jnp.bfloat16), np.float64) for v in (grad, kernel))
    )
    np.testing.assert_allclose(np.asarray(of_x, np.float64), exact, rtol=2.0**-8, atol=1e-5)


def test_a_biases_gradient_is_the_float32_sum():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 300, 4, 3)), jnp.bfloat16)
    bias = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    out, backward = jax.vjp(lambda x, b: add_bias(x, b, [1, 2]), x, bias)
    np.testing.assert_array_equal(out, x + bias.astype(jnp.bfloat16)[:, None, None, :])
    of_x, of_bias = backward(x)
    np.testing.assert_array_equal(of_x, x)
    assert of_bias.dtype == jnp.float32
    np.testing.assert_allclose(of_bias, np.asarray(x, np.float64).sum(axis=(1, 2)), rtol=1e-5, atol=1e-4)


def test_a_biases_gradient_by_a_product_is_the_same_sum():
    rng = np.random.default_rng(0)
    x, bias = jnp.asarray(rng.normal(size=(3, 200, 24)), jnp.bfloat16), jnp.zeros(24)
    _, backward = jax.vjp(lambda x, b: add_bias(x, b, [0, 1], by_product=True), x, bias)
    of_x, of_bias = backward(x)
    np.testing.assert_array_equal(of_x, x)
    assert of_bias.dtype == jnp.float32
    np.testing.assert_allclose(of_bias, np.asarray(x, np.float64).sum(axis=(0, 1)), rtol=1e-5, atol=1e-4)


def test_a_result_need_not_be_rounded():
    x, kernel, _ = arrays("td,df->tf", jnp.bfloat16)
    out = product(x, kernel, "td,df->tf", jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)
    gradients = jax.grad(lambda x, k: product(x, k, "td,df->tf", jnp.float32).sum(), (0, 1))(x, kernel)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("equation", SHAPES)
def test_float32_has_forward_mode_derivatives(equation):
    x, kernel, _ = arrays(equation, jnp.float32)
    out, tangent = jax.jvp(lambda x, k: product(x, k, equation), (x, kernel), (x, kernel))
    np.testing.assert_allclose(tangent, 2 * out, rtol=1e-5, atol=1e-5)
