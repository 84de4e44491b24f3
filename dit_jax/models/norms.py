"""LayerNorm, with learned scale and bias or modulated by adaLN (arXiv 2212.09748, section 3.2).

Statistics are in float32 whatever the type of the tokens. Letters: B batch, N tokens, D width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
EPSILON = 1e-6


def statistics(x: Array, epsilon: float | None = None) -> tuple[Array, Array]:
    """Mean and 1 / standard deviation over the last axis: x (..., D) float32 or bfloat16 -> (..., 1) float32.

    epsilon: added to the variance (None: EPSILON).
    """
    one_pass = x.dtype == jnp.bfloat16
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    if one_pass:
        # What the difference loses to cancellation is less than the rounding of x to bfloat16 has lost already.
        variance = jnp.maximum(jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    else:
        variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(variance + (EPSILON if epsilon is None else epsilon))


def normalize(x: Array, epsilon: float | None = None) -> Array:
    """LayerNorm without affine over the last axis, statistics in float32, output in float32."""
    mean, rstd = statistics(x, epsilon)
    return (x.astype(jnp.float32) - mean) * rstd


def shift_and_scale(normal: Array, shift: Array, scale: Array, dtype: Any) -> Array:
    """normal * (1 + scale) + shift: normal (B, N, D) float32, shift and scale (B, D) -> (B, N, D) in `dtype`."""
    wide_scale, wide_shift = (v.astype(jnp.float32)[:, None, :] for v in (scale, shift))
    return (normal * (1.0 + wide_scale) + wide_shift).astype(dtype)


def add_gated(x: Array, branch: Array, gate: Array | None) -> Array:
    """x + gate * branch: x and branch (B, N, D), gate (B, D), None for 1 -> (B, N, D)."""
    return x + branch if gate is None else x + gate[:, None, :] * branch


class RmsNorm(nn.Module):
    """RMSNorm with a learned scale (Zhang & Sennrich, arXiv 1910.07467), over the last axis or another one."""

    dtype: Any = jnp.float32
    epsilon: float = EPSILON
    axis: int = -1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (..., K) -> (..., K) in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[self.axis],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=self.axis, keepdims=True) + self.epsilon)
        along = [1] * x.ndim
        along[self.axis] = -1
        return (x * scale.reshape(along)).astype(self.dtype)


class AffineNorm(nn.Module):
    """LayerNorm with learned scale and bias."""

    dtype: Any = jnp.float32
    epsilon: float | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (..., D) -> (..., D) in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        broadcast = (1,) * (x.ndim - 1) + (x.shape[-1],)
        return (normalize(x, self.epsilon) * scale.reshape(broadcast) + bias.reshape(broadcast)).astype(
            self.dtype
        )
