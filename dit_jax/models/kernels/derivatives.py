"""GELU and adaLN's modulation with derivatives written by hand, which need the inputs of the forward pass alone.

Those that follow from the formulas keep every intermediate array: on a CPU a training step then takes a tenth longer.
They have no forward-mode derivatives. Letters: B batch, N tokens, D width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.models import norms

Array = jax.Array
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """GELU in its tanh approximation (Hendrycks & Gimpel, arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=True)


def _gelu_backward(x: Array, grad: Array) -> tuple[Array]:
    u = x.astype(jnp.float32)
    tanh = jnp.tanh(SQRT_2_OVER_PI * (u + 0.044715 * u**3))
    slope = SQRT_2_OVER_PI * (1.0 + 3 * 0.044715 * u**2)
    derivative = 0.5 * (1.0 + tanh) + 0.5 * u * (1.0 - tanh**2) * slope
    return ((grad.astype(jnp.float32) * derivative).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def modulate(x: Array, shift: Array, scale: Array, dtype: Any, epsilon: float | None = None) -> Array:
    """LayerNorm(x) * (1 + scale) + shift: x (B, N, D), shift and scale (B, D) -> (B, N, D) in `dtype`."""
    return _modulate_forward(x, shift, scale, dtype, epsilon)[0]


def _modulate_forward(
    x: Array, shift: Array, scale: Array, dtype: Any, epsilon: float | None
) -> tuple[Array, tuple[Array, ...]]:
    mean, rstd = norms.statistics(x, epsilon)
    normal = (x.astype(jnp.float32) - mean) * rstd
    return norms.shift_and_scale(normal, shift, scale, dtype), (x, mean, rstd, shift, scale)


def _modulate_backward(
    dtype: Any, epsilon: float | None, saved: tuple[Array, ...], grad: Array
) -> tuple[Array, Array, Array]:
    x, mean, rstd, shift, scale = saved
    normal, grad = (x.astype(jnp.float32) - mean) * rstd, grad.astype(jnp.float32)
    of_normal = grad * (1.0 + scale.astype(jnp.float32)[:, None, :])
    along = jnp.mean(of_normal * normal, axis=-1, keepdims=True)
    of_x = rstd * (of_normal - jnp.mean(of_normal, axis=-1, keepdims=True) - normal * along)
    of_shift, of_scale = jnp.sum(grad, axis=1), jnp.sum(grad * normal, axis=1)
    return of_x.astype(x.dtype), of_shift.astype(shift.dtype), of_scale.astype(scale.dtype)


modulate.defvjp(_modulate_forward, _modulate_backward)
