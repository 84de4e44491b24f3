"""The transformer block in the paper's four conditionings (arXiv 2212.09748, section 3.2 and figure 3).

| conditioning    | how timestep and label enter                                   | norms      |
|-----------------|----------------------------------------------------------------|------------|
| in_context      | as extra tokens of the sequence                                | affine     |
| cross_attention | as a context sequence, attended after self-attention           | affine     |
| adaln           | shift and scale of each norm, regressed from their sum         | not affine |
| adaln_zero      | the same and a gate on each branch, regressed to zero at first | not affine |

Letters: B batch, N tokens, M context tokens, D width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.models.attention import CrossAttention, SelfAttention
from dit_jax.models.embeddings import Linear

Array = jax.Array
EPSILON = 1e-6
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)

# Vectors of width D that adaLN regresses for a block: shift and scale (and gate) for attention and MLP.
MODULATIONS = {"in_context": 0, "cross_attention": 0, "adaln": 4, "adaln_zero": 6}


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


# modulate and gelu have derivatives of their own, which need nothing of the forward pass but its inputs. Those that
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


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """GELU in its tanh approximation (Hendrycks & Gimpel, arXiv 1606.08415)."""
    return nn.gelu(x, approximate=True)


def _gelu_backward(x: Array, grad: Array) -> tuple[Array]:
    u = x.astype(jnp.float32)
    tanh = jnp.tanh(SQRT_2_OVER_PI * (u + 0.044715 * u**3))
    slope = SQRT_2_OVER_PI * (1.0 + 3 * 0.044715 * u**2)
    derivative = 0.5 * (1.0 + tanh) + 0.5 * u * (1.0 - tanh**2) * slope
    return ((grad.astype(jnp.float32) * derivative).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def split_batch(x: Array, sharding: Any) -> Array:
    """x with its first axis split as `sharding` says (None: left to the compiler), forward and backward."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


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


class Mlp(nn.Module):
    """Two linear layers with tanh-approximated GELU between.

    flatten: compute them on flattened tokens (see `Linear`). Without it a TPU writes an output that the backward
    pass needs straight to its place among all layers' outputs.
    """

    hidden: int
    dtype: Any = jnp.float32
    flatten: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (B, N, D) -> (B, N, D)."""
        equation = "" if self.flatten else "bnd,dh->bnh"
        h = gelu(Linear((self.hidden,), dtype=self.dtype, name="fc1")(x, equation))
        return Linear((x.shape[-1],), dtype=self.dtype, name="fc2")(h, equation)


class Block(nn.Module):
    """One transformer block; the carry and output of a scan over layers."""

    num_heads: int
    mlp_hidden: int
    conditioning: str
    attention: str = "einsum"
    dtype: Any = jnp.float32
    batch_sharding: Any = None

    @nn.compact
    def __call__(self, x: Array, modulation: Array | None, context: Array | None) -> tuple[Array, None]:
        """x (B, N, D), modulation (B, 4 or 6, D) for adaLN, context (B, M, D) for cross-attention."""
        x = split_batch(x, self.batch_sharding)
        mesh = getattr(self.batch_sharding, "mesh", None)
        heads_split = mesh is not None and mesh.shape.get("tensor", 1) > 1
        attention = SelfAttention(self.num_heads, self.attention, self.dtype, heads_split, name="attn")
        mlp = Mlp(self.mlp_hidden, self.dtype, flatten=self.attention != "tokens_last", name="mlp")
        if modulation is None:
            x = x + attention(AffineNorm(self.dtype, name="norm1")(x))
            if context is not None:
                cross = CrossAttention(self.num_heads, self.dtype, name="cross_attn")
                x = x + cross(AffineNorm(self.dtype, name="norm_cross")(x), context)
            return x + mlp(AffineNorm(self.dtype, name="norm2")(x)), None

        vectors = [modulation[:, i] for i in range(modulation.shape[1])]  # each (B, D)
        if self.conditioning == "adaln":
            shift1, scale1, shift2, scale2 = vectors
            x = x + attention(modulate(x, shift1, scale1, self.dtype))
            return x + mlp(modulate(x, shift2, scale2, self.dtype)), None
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        x = x + gate1[:, None, :] * attention(modulate(x, shift1, scale1, self.dtype))
        return x + gate2[:, None, :] * mlp(modulate(x, shift2, scale2, self.dtype)), None
