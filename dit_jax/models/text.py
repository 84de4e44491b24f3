"""A caption as a network is told it: tokens, which of them there are, and one vector for all.

What a mask leaves out changes nothing, to the bit: it is no key, and the vector is the mean of the rest. Stable
Diffusion 3 alone masks nothing: its encoders' padding is a part of what the published network reads.

Letters: B batch, M text tokens, D width, E channels of the encoder's tokens, F of its pooled text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.conditions import BYTE_TOKENS, TextCondition
from dit_jax.config.text import BYTES, SD3
from dit_jax.models.blocks import Block
from dit_jax.models.compute import Compute
from dit_jax.models.embeddings import timestep_embedding
from dit_jax.models.layers import layers
from dit_jax.models.linear import Linear
from dit_jax.models.norms import RmsNorm
from dit_jax.models.parts import LAYER_NORM

Array = jax.Array
WINDOW = 7


class Text(NamedTuple):
    """A caption as an encoder gives it: tokens (B, M, E), mask (B, M) bool (None: all), pooled (B, F)."""

    tokens: Array
    mask: Array | None
    pooled: Array


def read_text(
    kind: TextCondition, condition: Mapping[str, Array], byte_encoder: ByteEncoder, dtype: jnp.dtype
) -> Text:
    """A condition of this kind as its encoder's output, in a module's `__call__`, to which its parameters belong.

    Embeddings are normed, as their size differs from one language model to the next (diffusion-bench, arXiv
    2606.24888); those of Stable Diffusion 3 are taken as they are. What is not pooled already is by its mean.
    """
    if kind.encoder == SD3:
        return Text(condition["context"], None, condition["pooled"])
    if kind.encoder == BYTES:
        mask = condition["tokens"] > 0
        tokens = byte_encoder(condition["tokens"])
    else:
        mask = condition["mask"]
        # Not left to the mask: 0 times what is not finite is not 0.
        tokens = jnp.where(mask[..., None], condition["context"], 0)
        tokens = RmsNorm(dtype, name="context_norm")(tokens)
    return Text(tokens, mask, masked_mean(tokens, mask))


def masked_mean(tokens: Array, mask: Array) -> Array:
    """The mean of the tokens that there are, 0 of none: (B, M, E), (B, M) bool -> (B, E) float32."""
    there = mask[..., None].astype(jnp.float32)
    return jnp.sum(tokens.astype(jnp.float32) * there, axis=1) / jnp.maximum(jnp.sum(there, axis=1), 1)


class ByteEncoder(nn.Module):
    """A small transformer over a caption's bytes, trained with the network: `depth` blocks with affine norms.

    A byte says little alone: the blocks are given each with its neighbours, WINDOW bytes, about a word.
    """

    width: int
    depth: int
    num_heads: int
    mlp_hidden: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """tokens (B, M) int as `byte_tokens` makes them -> (B, M, D); a number that is no token gives NaN."""
        compute, there, length = self.compute, tokens > 0, tokens.shape[1]
        of_byte = max(1, self.width // 4)
        table = self.param("embedding", nn.initializers.normal(1.0), (BYTE_TOKENS, of_byte), jnp.float32)
        x = jnp.asarray(table).at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        x = compute.split_batch(jnp.where((tokens != 0)[..., None], x, 0))
        x = jnp.pad(x, ((0, 0), (WINDOW // 2, WINDOW // 2), (0, 0)))
        x = jnp.concatenate([x[:, i : i + length] for i in range(WINDOW)], axis=-1)  # (B, M, WINDOW * D / 4)
        x = compute.gelu(Linear((self.width,), compute=compute, name="window")(x))
        x = x + timestep_embedding(jnp.arange(length), self.width)[None].astype(compute.dtype)
        if self.depth:
            blocks = layers(Block, self.depth, compute)(
                self.num_heads, self.mlp_hidden, "in_context", compute, name="blocks"
            )
            x, _ = blocks(x, None, (None, there))
        return LAYER_NORM.affine(compute.dtype, name="norm")(x)


class TextEmbedder(nn.Module):
    """An MLP F -> D -> D with SiLU of the pooled text, in float32: it costs next to nothing."""

    hidden_size: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, pooled: Array) -> Array:
        """pooled (B, F) -> (B, D)."""
        compute = dataclasses.replace(self.compute, dtype=jnp.float32)
        linear = functools.partial(
            Linear, (self.hidden_size,), compute=compute, precision=jax.lax.Precision.HIGHEST
        )
        return linear(name="fc2")(nn.silu(linear(name="fc1")(pooled)))
