"""A matrix product in 8-bit floats, forward and backward, with per-tensor scales.

Formats and their roles are those of Micikevicius et al. (arXiv 2209.05433): activations and weights as e4m3
(3 bits of mantissa, largest value 448), gradients as e5m2 (2 bits, 57344). Scales come from the tensor at hand
("current scaling"), so there is no state: nothing to keep in a checkpoint, no history to warm up. Flax's own
(`flax.linen.fp8_ops`) come from a history of past maxima, which is a collection of variables beside the parameters.

Scales are powers of two. Scaling is then exact, and what a number is rounded to depends on its scale only where it
underflows: hardly on what else is in the batch, nor on how the batch is split.

Operands stay 8 bits wide up to the product, with a single scalar after it: what XLA needs on a GPU with 8-bit
matrix units (compute capability 8.9 and later) to call cuBLASLt's 8-bit kernels. Elsewhere it computes the same
numbers with wider units, more slowly.

Letters: T tokens, I axes of the inputs, O axes of the outputs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Residuals = tuple[Array, Array, Array, Array]

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MAX_SHIFT = 60  # the product of two scales is then no subnormal number


def quantize(x: Array, dtype: Any) -> tuple[Array, Array]:
    """(q, scale) with x = q * scale up to q's rounding: q in `dtype`, shaped as x; scale () in x's type.

    The scale is the least power of two with which no element exceeds the largest number of `dtype` (but no less
    than 2^-60). If any element is not finite, the scale is NaN, and so is every result: one that merely saturated
    would hide it from whoever looks for it.
    """
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    fraction, exponent = jnp.frexp(largest)
    top_fraction, top_exponent = math.frexp(float(jnp.finfo(dtype).max))
    shift = jnp.minimum(top_exponent - exponent - (fraction > top_fraction), MAX_SHIFT)
    one = jnp.ones((), jnp.float32)
    scale = jnp.where(jnp.isfinite(largest), jnp.ldexp(one, -shift), jnp.nan)
    return (x * jnp.ldexp(one, shift).astype(x.dtype)).astype(dtype), scale.astype(x.dtype)


def dot(x: Array, kernel: Array, in_axes: int = 1) -> Array:
    """x (T, *I) times kernel (*I, *O), over the `in_axes` axes I -> (T, *O) in x's type, rounded once.

    Each float32 or bfloat16, and its gradient is of its type. No forward-mode derivative.
    """
    return _dot(x, kernel, in_axes, kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot(x: Array, kernel: Array, in_axes: int, kernel_type: Any) -> Array:
    return _forward(x, kernel, in_axes, kernel_type)[0]


def _forward(x: Array, kernel: Array, in_axes: int, kernel_type: Any) -> tuple[Array, Residuals]:
    (x8, x_scale), (kernel8, kernel_scale) = quantize(x, E4M3), quantize(kernel.astype(x.dtype), E4M3)
    contract = (tuple(range(1, 1 + in_axes)), tuple(range(in_axes)))
    # Sums may be short of float32's precision here ("fast accumulation"), as is usual, but not in the gradients.
    out = _product(x8, kernel8, contract, x.dtype, jax.lax.Precision.DEFAULT)
    return out * (x_scale * kernel_scale), (x8, x_scale, kernel8, kernel_scale)


def _backward(in_axes: int, kernel_type: Any, saved: Residuals, grad: Array) -> tuple[Array, Array]:
    x8, x_scale, kernel8, kernel_scale = saved
    grad8, grad_scale = quantize(grad, E5M2)
    outputs = (tuple(range(1, grad.ndim)), tuple(range(in_axes, kernel8.ndim)))
    of_x = _product(grad8, kernel8, outputs, grad.dtype, jax.lax.Precision.HIGHEST)
    of_kernel = _product(x8, grad8, ((0,), (0,)), kernel_type, jax.lax.Precision.HIGHEST)
    scale = (x_scale * grad_scale).astype(kernel_type)
    return of_x * (grad_scale * kernel_scale), of_kernel * scale


_dot.defvjp(_forward, _backward)


def _product(a: Array, b: Array, contract: Any, dtype: Any, precision: jax.lax.Precision) -> Array:
    """Summed in float32 by the matrix units and written in `dtype`: float32 tokens would cost the gain."""
    dimensions = (contract, ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)
