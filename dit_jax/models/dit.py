"""The Diffusion Transformer (Peebles & Xie, arXiv 2212.09748).

Letters: B batch, H and W latent sides, C latent channels, P patch side, N tokens, D width, L layers.

Parameters of all blocks are stacked on a leading layer axis, whether the loop over layers is rolled
(`lax.scan`) or unrolled, so a checkpoint serves both. The adaLN projections of all layers are one matrix
product outside the loop: they depend on the conditioning vector alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.conditions import AnyCondition, LabelCondition, TextCondition
from dit_jax.config import ConfigError, LoraConfig
from dit_jax.models.attention import with_those_before
from dit_jax.models.blocks import MODULATIONS, Block, Modulation
from dit_jax.models.compute import Compute
from dit_jax.models.embeddings import LabelEmbedder, TimestepEmbedder, patchify, unpatchify
from dit_jax.models.kernels.fused_norm import check_norm_kernel
from dit_jax.models.layers import layers
from dit_jax.models.linear import Linear
from dit_jax.models.on_patches import OnPatches
from dit_jax.models.parts import Parts
from dit_jax.models.text import ByteEncoder, TextEmbedder, read_text

Array = jax.Array


class Told(NamedTuple):
    """What a DiT's blocks are told: the vector of adaLN (B, D) float32, tokens (B, M, D) that stand in the
    sequence or are attended to, and which of them there are, (B, M) bool (None: all)."""

    vector: Array
    sequence: Array | None
    mask: Array | None


class DiT(OnPatches, nn.Module):
    """Diffusion Transformer: predicts noise (and a variance) from a noised latent, a timestep and a label or text.

    Attributes: sizes as in `dit_jax.config.ModelConfig`; `input_size` is the latent's side or (H, W), `base_size` the
    (H, W) around whose middle positions are counted where that is another (see `of_size`);
    `num_classes` 0 makes an unconditional model; `learn_sigma` doubles the output channels; `text` is the
    kind of captions that stand in the labels' place, and `text_layers` the blocks of an encoder of bytes; `parts` are
    what its blocks are made of; `compute` is how it is computed, of which its parameters do not depend.
    """

    input_size: int | tuple[int, int] = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    conditioning: str = "adaln_zero"
    text: TextCondition | None = None
    text_layers: int = 2
    lora: LoraConfig = LoraConfig()
    skip_layers: tuple[int, ...] = ()
    base_size: tuple[int, int] | None = None
    compute: Compute = Compute()
    parts: Parts = Parts()

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self) -> int:
        """C, or 2C when the variance is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def condition(self) -> AnyCondition:
        """What the network is told of a sample."""
        return self.text or LabelCondition(self.num_classes, self.class_dropout_prob)

    @property
    def null_label(self) -> int:
        """The label that stands for no label: the row after the last class."""
        return self.num_classes

    def of_size(self, size: tuple[int, int]) -> DiT:
        """The same network, with the same parameters, for latents of another height and width."""
        if size == self.latent_size:
            return self
        return self.clone(input_size=size, base_size=self.base_size or self.latent_size)

    @nn.compact
    def __call__(self, x: Array, t: Array, y: Any = None) -> Array:
        """x (B, H, W, C), t (B,) timesteps, y (B,) labels, {"label": labels} or a text's arrays -> (B, H, W, C or
        2C) float32."""
        y = y["label"] if isinstance(y, Mapping) and self.text is None else y
        self._check(x, y)
        d, n = self.hidden_size, self.num_tokens
        compute = self.compute.resolved(n, self.head_dim)
        tokens = Linear((d,), compute=compute, name="patch_embed")(patchify(x, self.patch_size))
        base = self.base_size and (tuple(side // self.patch_size for side in self.base_size),)
        positions = self.parts.positions(*self.grid_size, d, *(base or ()))
        tokens = tokens + jnp.asarray(positions, compute.dtype)[None]  # (B, N, D)

        time = TimestepEmbedder(d, compute, self.parts.sinusoid, name="t_embed")(t)  # (B, D), float32
        c, sequence, mask = self._told(time, y, compute)
        c = compute.split_batch(c)
        vectors = MODULATIONS[self.conditioning]
        modulation = None
        if vectors:
            modulation = Modulation((self.depth, vectors, d), compute, name="adaln")(c)
            modulation = modulation.swapaxes(0, 1)  # (L, B, 4 or 6, D)
        if self.conditioning == "in_context" and sequence is not None:
            tokens, sequence = jnp.concatenate([tokens, sequence], axis=1), None
            mask = with_those_before(n, mask)
        blocks = layers(Block, self.depth, compute, self.skip_layers)(
            self.num_heads, int(d * self.mlp_ratio), self.conditioning, compute, self.parts, name="blocks"
        )
        tokens, _ = blocks(tokens, modulation, (sequence, mask))
        tokens = compute.split_batch(tokens)[:, :n]  # in_context's extra tokens go

        if vectors:
            shift, scale = jnp.moveaxis(Modulation((2, d), compute, name="final_adaln")(c), 1, 0)
            tokens = self.parts.norm.modulate(tokens, shift, scale, compute)
        else:
            tokens = self.parts.norm.affine(compute.dtype, name="final_norm")(tokens)
        final_linear = Linear(
            (self.patch_size**2 * self.out_channels,),
            kernel_init=nn.initializers.zeros,
            compute=compute,
            # Not rounded again: guidance takes the difference of two outputs that are nearly the same.
            result=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
            name="final_linear",
        )
        return unpatchify(final_linear(tokens), self.patch_size, self.latent_size)

    def _told(self, time: Array, y: Any, compute: Compute) -> Told:
        """What the blocks are told of the time's embedding (B, D) and y."""
        if self.text is not None:
            return self._told_text(self.text, time, y, compute)
        conditions = [time]  # each (B, D), float32
        if y is not None and self.num_classes > 0:
            with_null = self.class_dropout_prob > 0
            conditions.append(LabelEmbedder(self.num_classes, self.hidden_size, with_null, name="y_embed")(y))
        c = sum(conditions[1:], conditions[0])
        if MODULATIONS[self.conditioning]:
            return Told(c, None, None)
        return Told(c, jnp.stack(conditions, axis=1).astype(compute.dtype), None)

    def _told_text(self, kind: TextCondition, time: Array, y: Any, compute: Compute) -> Told:
        d = self.hidden_size
        sizes = (d, self.text_layers, self.num_heads, int(d * self.mlp_ratio))
        text = read_text(kind, y, ByteEncoder(*sizes, compute, name="bytes_embed"), compute.dtype)
        tokens = compute.split_batch(Linear((d,), compute=compute, name="context_embed")(text.tokens))
        if MODULATIONS[self.conditioning]:
            return Told(time + TextEmbedder(d, compute, name="pooled_embed")(text.pooled), tokens, text.mask)
        tokens = jnp.concatenate([time.astype(compute.dtype)[:, None], tokens], axis=1)
        return Told(time, tokens, with_those_before(1, text.mask))

    def _check(self, x: Array, y: Any) -> None:
        if self.conditioning not in MODULATIONS:
            raise ConfigError(
                f"conditioning is {self.conditioning!r}; expected one of {', '.join(MODULATIONS)}"
            )
        check_norm_kernel(self.compute.norm_kernel, self.conditioning)
        if any(side % self.patch_size for side in self.latent_size):
            raise ConfigError(
                f"input_size {self.latent_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        expected = (*self.latent_size, self.in_channels)
        if x.ndim != 4 or x.shape[1:] != expected:
            raise ValueError(f"x has shape {x.shape}; expected (batch, {', '.join(map(str, expected))})")
        if self.text is not None:
            missing = [name for name in self.text.fields if not isinstance(y, Mapping) or name not in y]
            if missing:
                raise ValueError(f"the condition has no {', '.join(missing)}; expected the arrays of a text")
        elif self.num_classes > 0 and y is None:
            raise ValueError(f"y is missing; the model has {self.num_classes} classes")
