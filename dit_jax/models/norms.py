"""LayerNorm, with learned scale and bias or modulated by adaLN (arXiv 2212.09748, section 3.2).

Statistics are in float32 whatever the type of the tokens. Letters: B batch, N tokens, D width.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
EPSILON = 1e-6


def statistics(x: Array) -> tuple[Array, Array]:
    """Mean and 1 / standard deviation over the last axis: x (..., D) float32 or bfloat16 -> (..., 1) float32."""
    one_pass = x.dtype == jnp.bfloat16
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    if one_pass:
        # What the difference loses to cancellation is less than the rounding of x to bfloat16 has lost already.
        variance = jnp.maximum(jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    else:
        variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(variance + EPSILON)


def normalize(x: Array) -> Array:
    """LayerNorm without affine over the last axis, statistics in float32, output in float32."""
    mean, rstd = statistics(x)
    return (x.astype(jnp.float32) - mean) * rstd


# modulate has derivatives of its own, which need nothing of the forward pass but its inputs. Those that
# follow from the formulas keep every intermediate array: on a CPU a training step then takes a tenth longer.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def modulate(x: Array, shift: Array, scale: Array, dtype: Any) -> Array:
    """normalize(x) * (1 + scale) + shift: x (B, N, D), shift and scale (B, D) -> (B, N, D) in `dtype`."""
    return _modulate_forward(x, shift, scale, dtype)[0]


def _modulate_forward(x: Array, shift: Array, scale: Array, dtype: Any) -> tuple[Array, tuple[Array, ...]]:
    mean, rstd = statistics(x)
    normal = (x.astype(jnp.float32) - mean) * rstd
    wide_scale, wide_shift = (v.astype(jnp.float32)[:, None, :] for v in (scale, shift))
    return (normal * (1.0 + wide_scale) + wide_shift).astype(dtype), (x, mean, rstd, shift, scale)


def _modulate_backward(dtype: Any, saved: tuple[Array, ...], grad: Array) -> tuple[Array, Array, Array]:
    x, mean, rstd, shift, scale = saved
    normal, grad = (x.astype(jnp.float32) - mean) * rstd, grad.astype(jnp.float32)
    of_normal = grad * (1.0 + scale.astype(jnp.float32)[:, None, :])
    along = jnp.mean(of_normal * normal, axis=-1, keepdims=True)
    of_x = rstd * (of_normal - jnp.mean(of_normal, axis=-1, keepdims=True) - normal * along)
    of_shift, of_scale = jnp.sum(grad, axis=1), jnp.sum(grad * normal, axis=1)
    return of_x.astype(x.dtype), of_shift.astype(shift.dtype), of_scale.astype(scale.dtype)


modulate.defvjp(_modulate_forward, _modulate_backward)


def add_gated(x: Array, branch: Array, gate: Array | None) -> Array:
    """x + gate * branch: x and branch (B, N, D), gate (B, D), None for 1 -> (B, N, D)."""
    return x + branch if gate is None else x + gate[:, None, :] * branch


class AffineNorm(nn.Module):
    """LayerNorm with learned scale and bias."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (..., D) -> (..., D) in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        broadcast = (1,) * (x.ndim - 1) + (x.shape[-1],)
        return (normalize(x) * scale.reshape(broadcast) + bias.reshape(broadcast)).astype(self.dtype)
