"""The Diffusion Transformer (Peebles & Xie, arXiv 2212.09748).

Letters: B batch, H and W latent sides, C latent channels, P patch side, N tokens, D width, L layers.

Parameters of all blocks are stacked on a leading layer axis, whether the loop over layers is rolled
(`lax.scan`) or unrolled, so a checkpoint serves both. The adaLN projections of all layers are one matrix
product outside the loop: they depend on the conditioning vector alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.conditions import LabelCondition
from dit_jax.config import ConfigError
from dit_jax.models.attention import resolve_attention
from dit_jax.models.blocks import MODULATIONS, Block, split_batch, splits_inner_axes
from dit_jax.models.embeddings import (
    LabelEmbedder,
    Linear,
    TimestepEmbedder,
    patchify,
    sincos_positions,
    unpatchify,
)
from dit_jax.models.fused_norm import check_norm_kernel
from dit_jax.models.norms import AffineNorm, modulate
from dit_jax.models.products import add_bias, product

Array = jax.Array


def saves_cudnn_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """A remat policy that keeps what cuDNN's backward pass needs of its forward pass: the output, and the softmax's
    statistics, which have no name."""
    return bool(primitive.name == "dot_product_attention_fwd_wrapper")


REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("linear"),
    "dots_attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("linear", "attention"), saves_cudnn_attention
    ),
}


class Modulation(nn.Module):
    """SiLU, then a zero-initialised linear layer from the conditioning vector to adaLN's vectors."""

    features: tuple[int, ...]
    dtype: Any = jnp.float32
    as_matrix: bool = True  # as of `Linear`

    @nn.compact
    def __call__(self, c: Array) -> Array:
        """c (B, D) -> (B, *features)."""
        zeros = nn.initializers.zeros
        kernel = self.param("kernel", zeros, (c.shape[-1], *self.features), jnp.float32)
        bias = self.param("bias", zeros, self.features, jnp.float32)
        if self.as_matrix:
            kernel = kernel.reshape(c.shape[-1], -1)
        outputs = "efgh"[: kernel.ndim - 1]
        out = product(nn.silu(c).astype(self.dtype), kernel, f"bd,d{outputs}->b{outputs}")
        return add_bias(out.reshape(-1, *self.features), bias, [0])


class DiT(nn.Module):
    """Diffusion Transformer: predicts noise (and a variance) from a noised latent, a timestep and a label.

    Attributes: sizes as in `dit_jax.config.ModelConfig`; `input_size` is the latent's side or (H, W);
    `num_classes` 0 makes an unconditional model; `learn_sigma` doubles the output channels; `dtype` is the
    precision of computation (parameters, norms, softmax and the conditioning vector stay float32);
    `quantization` "fp8" computes the blocks' four large products (qkv, proj, fc1, fc2) in 8-bit floats, but with
    attention "tokens_last", which has products of its own, in `dtype`;
    `norm_kernel` "pallas" computes residual, gate, norm and modulation of a block in one kernel (see `fused_norm`);
    `batch_sharding` (a `jax.sharding.Sharding` of the first axis, None on one device) is kept by the activations
    of every block. Without it the compiler may split them along the width instead, as split parameters are.
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
    dtype: Any = jnp.float32
    quantization: str = "none"
    attention: str = "auto"
    norm_kernel: str = "xla"
    remat: str = "none"
    unroll: bool = False
    batch_sharding: Any = None

    @property
    def latent_size(self) -> tuple[int, int]:
        """(H, W) of the latent."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        h, w = self.latent_size
        return h // self.patch_size, w // self.patch_size

    @property
    def out_channels(self) -> int:
        """C, or 2C when the variance is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def condition(self) -> LabelCondition:
        """What the network is told of a sample."""
        return LabelCondition(self.num_classes, self.class_dropout_prob)

    @property
    def null_label(self) -> int:
        """The label that stands for no label: the row after the last class."""
        return self.num_classes

    @nn.compact
    def __call__(self, x: Array, t: Array, y: Array | Mapping[str, Array] | None = None) -> Array:
        """x (B, H, W, C), t (B,) timesteps, y (B,) labels, or {"label": labels} -> (B, H, W, C or 2C) float32."""
        y = y["label"] if isinstance(y, Mapping) else y
        self._check(x, y)
        d = self.hidden_size
        tokens = Linear((d,), dtype=self.dtype, name="patch_embed")(patchify(x, self.patch_size))
        positions = sincos_positions(*self.grid_size, d)
        tokens = tokens + jnp.asarray(positions, self.dtype)[None]  # (B, N, D)

        conditions = [TimestepEmbedder(d, name="t_embed")(t)]  # each (B, D), float32
        if y is not None and self.num_classes > 0:
            with_null = self.class_dropout_prob > 0
            conditions.append(LabelEmbedder(self.num_classes, d, with_null, name="y_embed")(y))
        c = split_batch(sum(conditions[1:], conditions[0]), self.batch_sharding)
        sequence = jnp.stack(conditions, axis=1).astype(self.dtype)  # (B, 1 or 2, D)

        vectors = MODULATIONS[self.conditioning]
        if self.conditioning == "in_context":
            tokens = jnp.concatenate([tokens, sequence], axis=1)
        modulation = None
        if vectors:
            as_matrix = not splits_inner_axes(self.batch_sharding)
            modulation = Modulation((self.depth, vectors, d), self.dtype, as_matrix, name="adaln")(c)
            modulation = modulation.swapaxes(0, 1)  # (L, B, 4 or 6, D)
        context = sequence if self.conditioning == "cross_attention" else None
        tokens, _ = self._blocks()(tokens, modulation, context)
        tokens = split_batch(tokens, self.batch_sharding)
        tokens = tokens[:, : self.grid_size[0] * self.grid_size[1]]  # in_context's extra tokens go

        if vectors:
            shift, scale = jnp.moveaxis(
                Modulation((2, d), self.dtype, as_matrix, name="final_adaln")(c), 1, 0
            )
            tokens = modulate(tokens, shift, scale, self.dtype)
        else:
            tokens = AffineNorm(self.dtype, name="final_norm")(tokens)
        features = (self.patch_size**2 * self.out_channels,)
        final_linear = Linear(
            features,
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            # Not rounded again: guidance takes the difference of two outputs that are nearly the same.
            result=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
            name="final_linear",
        )
        return unpatchify(final_linear(tokens), self.patch_size, self.latent_size)

    def _blocks(self) -> nn.Module:
        """The scan over layers: (tokens, (L, B, k, D) modulation, context) -> (tokens, None)."""
        block: Any = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=self.unroll)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
            unroll=self.depth if self.unroll else 1,
        )
        return scanned(
            num_heads=self.num_heads,
            mlp_hidden=int(self.hidden_size * self.mlp_ratio),
            conditioning=self.conditioning,
            attention=resolve_attention(
                self.attention, self.dtype, math.prod(self.grid_size), self.hidden_size // self.num_heads
            ),
            dtype=self.dtype,
            quantization=self.quantization,
            norm_kernel=self.norm_kernel,
            batch_sharding=self.batch_sharding,
            name="blocks",
        )

    def _check(self, x: Array, y: Array | None) -> None:
        if self.conditioning not in MODULATIONS:
            raise ConfigError(
                f"conditioning is {self.conditioning!r}; expected one of {', '.join(MODULATIONS)}"
            )
        if self.remat != "none" and self.remat not in REMAT_POLICIES:
            raise ConfigError(f"remat is {self.remat!r}; expected one of none, {', '.join(REMAT_POLICIES)}")
        check_norm_kernel(self.norm_kernel, self.conditioning)
        if self.quantization not in ("none", "fp8"):
            raise ConfigError(f"quantization is {self.quantization!r}; expected none or fp8")
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
        if self.num_classes > 0 and y is None:
            raise ValueError(f"y is missing; the model has {self.num_classes} classes")
