"""Products with parameters and sums with biases, whose gradients are float32 before anything adds them up.

A network that computes in bfloat16 casts its float32 parameters. By the derivative of that cast a parameter's
gradient would leave its product in bfloat16, and so be added up over devices: rounded to 8 bits at every addition.
Here the product's float32 sums go out as they are.

Where x is float32 nothing is written by hand: all derivatives are jax's own, forward-mode ones too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def product(x: Array, kernel: Array, equation: str, result: Any = None, precision: Any = None) -> Array:
    """einsum(equation, x, kernel), multiplied in x's type, of type `result` (None: x's).

    x float32 or bfloat16, kernel float32. Every letter of the equation is in two of its three terms. precision: of
    the products where x is float32 (None: jax's default); those of two bfloat16 are exact.
    """
    result = jnp.dtype(result or x.dtype)
    if x.dtype == kernel.dtype:
        return jnp.einsum(equation, x, kernel, precision=precision, preferred_element_type=result)
    return _narrow_product(x, kernel, equation, result)


def wide_einsum(equation: str, a: Array, b: Array) -> Array:
    """einsum of two arrays of one type, float32 or bfloat16, with the float32 sums as its result."""

    def cpu(a: Array, b: Array) -> Array:  # XLA's CPU compiler refuses some such products of bfloat16
        return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32))

    def accelerator(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    found: Array = jax.lax.platform_dependent(a, b, cpu=cpu, default=accelerator)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _narrow_product(x: Array, kernel: Array, equation: str, result: Any) -> Array:
    kernel = kernel.astype(x.dtype)
    return wide_einsum(equation, x, kernel) if result == jnp.float32 else jnp.einsum(equation, x, kernel)


def _product_forward(
    x: Array, kernel: Array, equation: str, result: Any
) -> tuple[Array, tuple[Array, Array]]:
    return _narrow_product(x, kernel, equation, result), (x, kernel)


def _product_backward(
    equation: str, result: Any, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    operands, _, of_out = equation.partition("->")
    of_x, _, of_kernel = operands.partition(",")
    grad = grad.astype(x.dtype)
    grad_x = jnp.einsum(f"{of_out},{of_kernel}->{of_x}", grad, kernel.astype(x.dtype))
    return grad_x, wide_einsum(f"{of_x},{of_out}->{of_kernel}", x, grad)


_narrow_product.defvjp(_product_forward, _product_backward)


def add_bias(x: Array, bias: Array, missing: Sequence[int], by_product: bool = False) -> Array:
    """x + bias in x's type: x float32 or bfloat16; bias float32, without x's axes `missing`.

    by_product: the gradient of a bias of a bfloat16 x (B, N, D) is a product with ones (see `times_ones`).
    """
    if x.dtype == bias.dtype:
        return x + jnp.expand_dims(bias, missing)
    return _narrow_sum(x, bias, tuple(missing), by_product)


def times_ones(equation: str, x: Array, size: int) -> Array:
    """einsum of ones (8, size) and x, bfloat16, with float32 sums as a reduction's: on a TPU several times quicker,
    where no product makes x. The barrier keeps the compiler from making a reduction of it."""
    ones = jax.lax.optimization_barrier(jnp.ones((8, size), x.dtype))
    return wide_einsum(equation, ones, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _narrow_sum(x: Array, bias: Array, missing: tuple[int, ...], by_product: bool) -> Array:
    return x + jnp.expand_dims(bias.astype(x.dtype), missing)


def _sum_backward(missing: tuple[int, ...], by_product: bool, _: None, grad: Array) -> tuple[Array, Array]:
    if by_product:
        return grad, times_ones("on,bnd->bod", grad, grad.shape[1])[:, 0].sum(axis=0)
    return grad, jnp.sum(grad, axis=missing, dtype=jnp.float32)


_narrow_sum.defvjp(lambda x, bias, *how: (_narrow_sum(x, bias, *how), None), _sum_backward)
