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

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.models.attention import CrossAttention, SelfAttention
from dit_jax.models.embeddings import Linear

Array = jax.Array
EPSILON = 1e-6

# Vectors of width D that adaLN regresses for a block: shift and scale (and gate) for attention and MLP.
MODULATIONS = {"in_context": 0, "cross_attention": 0, "adaln": 4, "adaln_zero": 6}


def normalize(x: Array) -> Array:
    """LayerNorm without affine over the last axis, statistics in float32, output in float32."""
    one_pass = x.dtype == jnp.bfloat16
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    if one_pass:
        # What the difference loses to cancellation is less than the rounding of x to bfloat16 has lost already.
        variance = jnp.maximum(jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean), 0.0)
        return (x - mean) * jax.lax.rsqrt(variance + EPSILON)
    x = x - mean
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)


def modulate(x: Array, shift: Array, scale: Array, dtype: Any) -> Array:
    """normalize(x) * (1 + scale) + shift: x (B, N, D), shift and scale (B, D) -> (B, N, D) in `dtype`."""
    scale, shift = (v.astype(jnp.float32)[:, None, :] for v in (scale, shift))
    return (normalize(x) * (1.0 + scale) + shift).astype(dtype)


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
        h = nn.gelu(Linear((self.hidden,), dtype=self.dtype, name="fc1")(x, equation), approximate=True)
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
        attention = SelfAttention(self.num_heads, self.attention, self.dtype, name="attn")
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
