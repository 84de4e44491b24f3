"""Stable Diffusion 3's multimodal Diffusion Transformer (Esser et al., arXiv 2403.03206, figure 2).

Letters: B batch, H and W latent sides, C latent channels, P patch side, N tokens of the picture, M of the text,
D width, L layers, E channels of the text's tokens, F of the pooled text.

Parameters of blocks that are alike are stacked on a leading layer axis: those with a second attention, those
without, and the last one, whose text goes no further.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.conditions import TextCondition
from dit_jax.config import ConfigError, LoraConfig
from dit_jax.config.check import mmdit_sizes
from dit_jax.config.text import BYTES, SD3
from dit_jax.models.blocks import Modulation
from dit_jax.models.compute import Compute
from dit_jax.models.embeddings import TimestepEmbedder, cropped_positions, patchify, unpatchify
from dit_jax.models.joint_blocks import DUAL, LAST_TEXT, PICTURE, TEXT, JointBlock
from dit_jax.models.layers import layers
from dit_jax.models.linear import Linear
from dit_jax.models.on_patches import OnPatches
from dit_jax.models.parts import LAYER_NORM
from dit_jax.models.text import ByteEncoder, TextEmbedder, read_text

Array = jax.Array
HEAD_DIM = 64

SD3_TEXT = TextCondition(SD3, 333, 4096, 2048, clip_widths=(768, 1280))


@dataclasses.dataclass(frozen=True)
class Group:
    """Blocks that are alike: their name, the number of the first, how many, and vectors of adaLN for each stream."""

    name: str
    first: int
    count: int
    vectors: dict[str, int]


class MMDiT(OnPatches, nn.Module):
    """Predicts the velocity from a noised latent, its time, and a text: tokens and a pooled vector.

    Attributes: `input_size` the latent's side or (H, W); `num_heads` None for heads of 64 channels; `dual_blocks` how
    many blocks, from the first on, let the picture attend to itself as well; `qk_norm` whether queries and keys are
    normed; positions are cut from the middle of a table of `positions_side` x `positions_side`, whose entries lie
    positions_base / positions_side apart; `text` what it is told, `text_layers` the blocks of an encoder of bytes;
    `compute` is how it is computed, of which its parameters do not depend.
    """

    input_size: int | tuple[int, int] = 128
    patch_size: int = 2
    in_channels: int = 16
    hidden_size: int = 1536
    depth: int = 24
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    dual_blocks: int = 0
    positions_side: int = 192
    positions_base: int = 64
    text: TextCondition = SD3_TEXT
    text_layers: int = 2
    lora: LoraConfig = LoraConfig()
    skip_layers: tuple[int, ...] = ()
    compute: Compute = Compute()

    @classmethod
    def named(cls, name: str, **options: Any) -> MMDiT:
        """A size by its name, such as "SD3-medium" or "MMDiT-12"; ConfigError for another name."""
        return cls(**mmdit_sizes(name) | options)

    @property
    def condition(self) -> TextCondition:
        """What the network is told of a sample."""
        return self.text

    @property
    def out_channels(self) -> int:
        """C: no variance is learned."""
        return self.in_channels

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.num_heads or self.hidden_size // HEAD_DIM

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.heads

    @property
    def groups(self) -> tuple[Group, ...]:
        """The blocks, in their order."""
        between = self.depth - 1 - self.dual_blocks
        found = (
            Group("dual_blocks", 0, self.dual_blocks, {"x": DUAL, "context": TEXT}),
            Group("joint_blocks", self.dual_blocks, between, {"x": PICTURE, "context": TEXT}),
            Group("last_blocks", self.depth - 1, 1, {"x": PICTURE, "context": LAST_TEXT}),
        )
        return tuple(group for group in found if group.count)

    @nn.compact
    def __call__(self, x: Array, t: Array, condition: Mapping[str, Array]) -> Array:
        """x (B, H, W, C), t (B,) times as shown, 0 to 1000 in Stable Diffusion 3, condition as `text` says, of sd3
        {"context": (B, M, E), "pooled": (B, F)} -> (B, H, W, C) float32."""
        self._check(x)
        d, mlp_hidden = self.hidden_size, int(self.hidden_size * self.mlp_ratio)
        length = condition["tokens" if self.text.encoder == BYTES else "context"].shape[1]
        compute = self.compute.resolved(self.num_tokens + length, self.head_dim)
        byte_encoder = ByteEncoder(d, self.text_layers, self.heads, mlp_hidden, compute, name="bytes_embed")
        context, mask, pooled = read_text(self.text, condition, byte_encoder, compute.dtype)
        tokens = Linear((d,), compute=compute, name="patch_embed")(patchify(x, self.patch_size))
        positions = cropped_positions(*self.grid_size, d, self.positions_side, self.positions_base)
        tokens = tokens + jnp.asarray(positions, compute.dtype)[None]
        context = Linear((d,), compute=compute, name="context_embed")(context)

        c = TimestepEmbedder(d, compute, name="t_embed")(t)
        c = compute.split_batch(c + TextEmbedder(d, compute, name="pooled_embed")(pooled))  # (B, D) float32
        streams = {"x": tokens, "context": context}
        for group in self.groups:
            modulation = {
                stream: Modulation((group.count, vectors, d), compute, name=f"{group.name}_{stream}_adaln")(c)
                for stream, vectors in group.vectors.items()
            }
            modulation = jax.tree.map(lambda a: a.swapaxes(0, 1), modulation)  # (L, B, vectors, D)
            skipped = [i - group.first for i in self.skip_layers if 0 <= i - group.first < group.count]
            blocks = layers(JointBlock, group.count, compute, skipped)(
                self.heads, mlp_hidden, compute, self.qk_norm, group.name == "dual_blocks",
                group.name == "last_blocks", name=group.name,
            )  # fmt: skip
            streams, _ = blocks(streams, modulation, mask)
        tokens = compute.split_batch(streams["x"])
        shift, scale = jnp.moveaxis(Modulation((2, d), compute, name="final_adaln")(c), 1, 0)
        tokens = LAYER_NORM.modulate(tokens, shift, scale, compute)
        final_linear = Linear(
            (self.patch_size**2 * self.in_channels,), kernel_init=nn.initializers.zeros, compute=compute,
            result=jnp.float32, precision=jax.lax.Precision.HIGHEST, name="final_linear",
        )  # fmt: skip
        return unpatchify(final_linear(tokens), self.patch_size, self.latent_size)

    def _check(self, x: Array) -> None:
        if any(side % self.patch_size for side in self.latent_size):
            raise ConfigError(
                f"input_size {self.latent_size} is not divisible by patch_size {self.patch_size}"
            )
        if max(self.grid_size) > self.positions_side:
            raise ConfigError(
                f"input_size {self.latent_size} has {self.grid_size} patches; expected at most positions_side, "
                f"{self.positions_side}, of them"
            )
        if self.hidden_size % self.heads:
            raise ConfigError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.heads}")
        if not 0 <= self.dual_blocks < self.depth:
            raise ConfigError(f"dual_blocks is {self.dual_blocks}; expected 0 to {self.depth - 1}")
        expected = (*self.latent_size, self.in_channels)
        if x.ndim != 4 or x.shape[1:] != expected:
            raise ValueError(f"x has shape {x.shape}; expected (batch, {', '.join(map(str, expected))})")
