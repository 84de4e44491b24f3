"""The transformer block in the paper's four conditionings (arXiv 2212.09748, section 3.2 and figure 3).

| conditioning    | how timestep and label enter                                   | norms      |
|-----------------|----------------------------------------------------------------|------------|
| in_context      | as extra tokens of the sequence                                | affine     |
| cross_attention | as a context sequence, attended after self-attention           | affine     |
| adaln           | shift and scale of each norm, regressed from their sum         | not affine |
| adaln_zero      | the same and a gate on each branch, regressed to zero at first | not affine |

A caption's tokens join the sequence where the conditioning is in context, and the context elsewhere. Under adaLN time
and pooled text modulate, and the tokens of the picture attend to the text's between self-attention and MLP (PixArt,
arXiv 2310.00426, section 2.3).

Letters: B batch, N tokens, M context tokens, D width, L layers.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.models.attention import CrossAttention, SelfAttention
from dit_jax.models.compute import Compute
from dit_jax.models.initializers import Initializer
from dit_jax.models.norms import add_gated
from dit_jax.models.parts import Parts

Array = jax.Array
Given = tuple[Array | None, Array | None]
"""What all blocks are given: a context (B, M, D) to attend to, if any, and which keys there are, (B, M) bool (None:
all): of the context, and without one of the sequence itself, whose M is N."""

# Vectors of width D that adaLN regresses for a block: shift and scale (and gate) for attention and MLP.
MODULATIONS = {"in_context": 0, "cross_attention": 0, "adaln": 4, "adaln_zero": 6}


class Block(nn.Module):
    """One transformer block; a layer of `layers`."""

    num_heads: int
    mlp_hidden: int
    conditioning: str
    compute: Compute
    parts: Parts = Parts()

    @nn.compact
    def __call__(self, x: Array, modulation: Array | None, given: Given) -> tuple[Array, None]:
        """x (B, N, D), modulation (B, 4 or 6, D) for adaLN."""
        context, mask = given
        compute, norm = self.compute, self.parts.norm
        second = self.parts.second_norm or norm
        x = compute.split_batch(x)
        attention = SelfAttention(self.num_heads, compute, self.parts.queries_keys, name="attn")
        mlp = self.parts.mlp(self.mlp_hidden, compute, name="mlp")

        def to_context(x: Array, context: Array, out_init: Initializer | None = None) -> Array:
            cross = CrossAttention(self.num_heads, compute, out_init, name="cross_attn")
            return cross(norm.affine(compute.dtype, name="norm_cross")(x), context, mask)

        if modulation is None:
            of_itself = mask if context is None else None
            x = x + attention(norm.affine(compute.dtype, name="norm1")(x), of_itself)
            if context is not None:
                x = x + to_context(x, context)
            return x + mlp(second.affine(compute.dtype, name="norm2")(x)), None

        vectors = [modulation[:, i] for i in range(modulation.shape[1])]  # each (B, D)
        if self.conditioning == "adaln":
            shift1, scale1, shift2, scale2 = vectors
            gate1 = gate2 = None
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        x, h = norm.add_and_modulate(x, None, None, shift1, scale1, compute)
        branch, gate = attention(h), gate1
        if context is not None:
            x = add_gated(x, branch, gate)
            branch, gate = (
                to_context(x, context, nn.initializers.zeros),
                None,
            )  # as adaLN-Zero's branches begin
        x, h = second.add_and_modulate(x, branch, gate, shift2, scale2, compute)
        # This sum is not the next block's first: the loop over layers would carry, and keep, its two terms.
        return add_gated(x, mlp(h), gate2), None


class Modulation(nn.Module):
    """SiLU, then a zero-initialised linear layer from the conditioning vector to adaLN's vectors.

    Those of all layers are one product: they depend on the conditioning vector alone. Where devices share the
    kernel, each computes its own part of the outputs, for the rows of all who share it: vectors go around, not the
    kernel, which is a third of the network and would be gathered for a product with few rows.
    """

    features: tuple[int, ...]
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, c: Array) -> Array:
        """c (B, D) -> (B, *features)."""
        zeros = nn.initializers.zeros
        kernel = self.param("kernel", zeros, (c.shape[-1], *self.features), jnp.float32)
        bias = self.param("bias", zeros, self.features, jnp.float32)
        compute = self.compute
        split = compute.splits_inner_axes or compute.fsdp_axis is not None
        if not split:
            kernel = kernel.reshape(c.shape[-1], -1)
        outputs = "efgh"[: kernel.ndim - 1]
        c = compute.for_modulation(nn.silu(c).astype(compute.dtype), last=None)
        out = compute.product(c, kernel, f"bd,d{outputs}->b{outputs}")
        out = compute.for_modulation(out, last=compute.fsdp_axis)
        out = compute.add_bias(out.reshape(-1, *self.features), bias, [0])
        # Each device has its own rows again. Where it has one, and inner axes are split as well, XLA's partitioner
        # would else give this a wrong gradient (seen in jax 0.10 on a mesh of 2 x 2 x 2).
        return compute.split_batch(out) if split else out
