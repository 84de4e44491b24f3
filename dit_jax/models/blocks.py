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

from dit_jax.models.attention import TOKENS_LAST, CrossAttention, SelfAttention
from dit_jax.models.embeddings import Linear
from dit_jax.models.fused_norm import gate_residual_modulate
from dit_jax.models.norms import AffineNorm, add_gated, modulate

Array = jax.Array
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)

# Vectors of width D that adaLN regresses for a block: shift and scale (and gate) for attention and MLP.
MODULATIONS = {"in_context": 0, "cross_attention": 0, "adaln": 4, "adaln_zero": 6}


@jax.custom_vjp  # for the reason that `norms.modulate` has a derivative of its own
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


def splits_inner_axes(sharding: Any) -> bool:
    """Whether the mesh of the batch's sharding also splits inner axes of the parameters (over "tensor")."""
    mesh = getattr(sharding, "mesh", None)
    return mesh is not None and mesh.shape.get("tensor", 1) > 1


class Mlp(nn.Module):
    """Two linear layers with tanh-approximated GELU between.

    flatten: compute them on flattened tokens (see `Linear`). Without it a TPU writes an output that the backward
    pass needs straight to its place among all layers' outputs.
    """

    hidden: int
    dtype: Any = jnp.float32
    flatten: bool = True
    quantization: str = "none"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (B, N, D) -> (B, N, D)."""
        equation = "" if self.flatten else "bnd,dh->bnh"
        linear = functools.partial(Linear, dtype=self.dtype, quantization=self.quantization)
        h = linear((self.hidden,), name="fc1")(x, equation)
        if self.quantization == "fp8":
            # Without Triton's products XLA would join GELU to this one, and then refuse to compile what it made.
            h = jax.lax.optimization_barrier(h)
        return linear((x.shape[-1],), name="fc2")(gelu(h), equation)


class Block(nn.Module):
    """One transformer block; the carry and output of a scan over layers."""

    num_heads: int
    mlp_hidden: int
    conditioning: str
    attention: str = "einsum"
    dtype: Any = jnp.float32
    quantization: str = "none"
    norm_kernel: str = "xla"
    batch_sharding: Any = None

    @nn.compact
    def __call__(self, x: Array, modulation: Array | None, context: Array | None) -> tuple[Array, None]:
        """x (B, N, D), modulation (B, 4 or 6, D) for adaLN, context (B, M, D) for cross-attention."""
        x = split_batch(x, self.batch_sharding)
        heads_split = splits_inner_axes(self.batch_sharding)
        attention = SelfAttention(
            self.num_heads, self.attention, self.dtype, heads_split, self.quantization, name="attn"
        )
        flatten = self.attention not in TOKENS_LAST
        mlp = Mlp(self.mlp_hidden, self.dtype, flatten, self.quantization, name="mlp")
        if modulation is None:
            x = x + attention(AffineNorm(self.dtype, name="norm1")(x))
            if context is not None:
                cross = CrossAttention(self.num_heads, self.dtype, heads_split, name="cross_attn")
                x = x + cross(AffineNorm(self.dtype, name="norm_cross")(x), context)
            return x + mlp(AffineNorm(self.dtype, name="norm2")(x)), None

        vectors = [modulation[:, i] for i in range(modulation.shape[1])]  # each (B, D)
        if self.conditioning == "adaln":
            shift1, scale1, shift2, scale2 = vectors
            gate1 = gate2 = None
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        x, h = self._add_and_norm(x, None, None, shift1, scale1)
        x, h = self._add_and_norm(x, attention(h), gate1, shift2, scale2)
        # This sum is not the next block's first: the loop over layers would carry, and keep, its two terms.
        return add_gated(x, mlp(h), gate2), None

    def _add_and_norm(
        self, x: Array, branch: Array | None, gate: Array | None, shift: Array, scale: Array
    ) -> tuple[Array, Array]:
        """x + gate * branch (B, N, D), and its modulated norm."""
        if self.norm_kernel == "pallas":
            return gate_residual_modulate(x, branch, gate, shift, scale, self.dtype, self.batch_sharding)
        if branch is not None:
            x = add_gated(x, branch, gate)
        return x, modulate(x, shift, scale, self.dtype)
