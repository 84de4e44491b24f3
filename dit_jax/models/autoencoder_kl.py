"""The variational autoencoder of latent diffusion (Stable Diffusion's `AutoencoderKL`) in Flax.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752), section 3.1
and appendix G. Architecture and hyperparameters are those of a diffusers `config.json`; weights come in
through `dit_jax.interop.diffusers`.

Legend: N batch, H W image height and width, f downsample factor, C channels, Z latent channels.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution
NORM_EPS = 1e-6

# Keys of config.json that say nothing about the network, or must have one value for this network to be right.
_IGNORED = ("sample_size", "force_upcast")
_FIXED: dict[str, Any] = {"act_fn": "silu", "latents_mean": None, "latents_std": None}


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Hyperparameters under diffusers' names and defaults."""

    in_channels: int = 3
    """Channels of the images read."""
    out_channels: int = 3
    """Channels of the images written."""
    block_out_channels: tuple[int, ...] = (64,)
    """Width of each resolution, finest first; every further one halves height and width."""
    layers_per_block: int = 1
    """Residual blocks per resolution in the encoder; the decoder has one more."""
    latent_channels: int = 4
    """Channels Z of the latent."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm."""
    scaling_factor: float = 0.18215
    """Factor that brings latents to about unit standard deviation (see `to_latents`)."""
    shift_factor: float | None = None
    """Mean taken off before scaling; None is 0."""
    use_quant_conv: bool = True
    """1x1 convolution after the encoder."""
    use_post_quant_conv: bool = True
    """1x1 convolution before the decoder."""
    mid_block_add_attention: bool = True
    """Single-head self-attention at the coarsest resolution."""

    def __post_init__(self) -> None:
        positive = ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
        for name in positive:
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        widths = self.block_out_channels
        divisible = len(widths) > 0 and all(c > 0 and c % self.norm_num_groups == 0 for c in widths)
        _require(
            divisible,
            "block_out_channels",
            list(widths),
            f"multiples of norm_num_groups {self.norm_num_groups}",
        )
        _require(self.scaling_factor > 0, "scaling_factor", self.scaling_factor, "a number above 0")

    @property
    def downsample_factor(self) -> int:
        """Image side over latent side, f = 2^(resolutions - 1)."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, text: str) -> AutoencoderKLConfig:
        """The config of a diffusers `config.json`.

        Keys that begin with "_" are notes and ignored. Raises ValueError, naming the key, for one that is
        unknown, of the wrong type, or of a value this network does not cover.
        """
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"the config is {type(found).__name__}; expected a JSON object")
        _require_class(found)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in found.items():
            if key.startswith("_") or key in _IGNORED or key in ("down_block_types", "up_block_types"):
                continue
            if key in _FIXED:
                _require(value == _FIXED[key], key, value, repr(_FIXED[key]))
            elif key in fields:
                values[key] = _typed(key, value, str(fields[key].type))
            else:
                raise ValueError(f"unknown key {key!r} = {value!r} in an AutoencoderKL config")
        config = cls(**values)
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            expected = [kind] * len(config.block_out_channels)
            _require(found.get(key, expected) == expected, key, found.get(key), repr(expected))
        return config

    def to_json(self) -> str:
        """The diffusers `config.json` of this network."""
        resolutions = len(self.block_out_channels)
        written = {
            "_class_name": "AutoencoderKL",
            **dataclasses.asdict(self),
            "act_fn": _FIXED["act_fn"],
            "down_block_types": ["DownEncoderBlock2D"] * resolutions,
            "up_block_types": ["UpDecoderBlock2D"] * resolutions,
        }
        return json.dumps(written, indent=2, sort_keys=True) + "\n"


def _require(good: bool, key: str, found: object, expected: str) -> None:
    if not good:
        raise ValueError(f"{key} is {found!r} in an AutoencoderKL config; expected {expected}")


def _require_class(found: Mapping[str, Any]) -> None:
    name = found.get("_class_name", "AutoencoderKL")
    _require(name == "AutoencoderKL", "_class_name", name, "'AutoencoderKL'")


def _typed(key: str, value: Any, kind: str) -> Any:
    """`value` as the field's declared type, or ValueError."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    integer = isinstance(value, int) and not isinstance(value, bool)
    if kind == "tuple[int, ...]":
        good = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        _require(good, key, value, "a list of integers")
        return tuple(value)
    good = {
        "int": integer,
        "bool": isinstance(value, bool),
        "float": number,
        "float | None": number or value is None,
    }[kind]
    _require(good, key, value, kind)
    return value


def to_latents(z: jax.Array, scaling_factor: float, shift_factor: float | None = None) -> jax.Array:
    """Latents of about zero mean and unit variance, as the diffusion model sees them: (z - shift) * scale."""
    return (z - (shift_factor or 0.0)) * scaling_factor


def from_latents(latents: jax.Array, scaling_factor: float, shift_factor: float | None = None) -> jax.Array:
    """The inverse of `to_latents`: what `AutoencoderKL.decode` takes."""
    return latents / scaling_factor + (shift_factor or 0.0)


# ------------------------------------------------------------------------------------------- network


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(_norm(self.groups, self.dtype, "norm1")(x))
        h = nn.Conv(self.features, (3, 3), padding=1, dtype=self.dtype, name="conv1")(h)
        h = nn.silu(_norm(self.groups, self.dtype, "norm2")(h))
        h = nn.Conv(self.features, (3, 3), padding=1, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h  # (N, h, w, features)


class AttentionBlock(nn.Module):
    """x + single-head self-attention over all pixels; softmax in float32."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, h, w, c = x.shape
        tokens = _norm(self.groups, self.dtype, "group_norm")(x).reshape(n, h * w, c)
        q, k, v = (nn.Dense(c, dtype=self.dtype, name=name)(tokens) for name in ("to_q", "to_k", "to_v"))
        scores = jnp.einsum("nqc,nkc->nqk", q, k, preferred_element_type=jnp.float32) * c**-0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)  # (N, hw, hw)
        out = nn.Dense(c, dtype=self.dtype, name="to_out")(jnp.einsum("nqk,nkc->nqc", weights, v))
        return x + out.reshape(n, h, w, c)


class MidBlock(nn.Module):
    """Two residual blocks at the coarsest resolution, attention between them."""

    features: int
    groups: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResnetBlock(self.features, self.groups, self.dtype, name="resnets_0")(x)
        if self.attention:
            x = AttentionBlock(self.groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(self.features, self.groups, self.dtype, name="resnets_1")(x)


class Encoder(nn.Module):
    """Images (N, H, W, C) -> moments before the quant convolution (N, H/f, W/f, 2 Z)."""

    config: AutoencoderKLConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, groups, dtype = self.config, self.config.norm_num_groups, self.dtype
        widths = c.block_out_channels
        x = nn.Conv(widths[0], (3, 3), padding=1, dtype=dtype, name="conv_in")(x)
        for i, width in enumerate(widths):
            for j in range(c.layers_per_block):
                x = ResnetBlock(width, groups, dtype, name=f"down_blocks_{i}_resnets_{j}")(x)
            if i < len(widths) - 1:  # padded on the far sides only, as the published weights expect
                pad = ((0, 1), (0, 1))
                name = f"down_blocks_{i}_downsample"
                x = nn.Conv(width, (3, 3), strides=2, padding=pad, dtype=dtype, name=name)(x)
        x = MidBlock(widths[-1], groups, c.mid_block_add_attention, dtype, name="mid_block")(x)
        x = nn.silu(_norm(groups, dtype, "conv_norm_out")(x))
        return nn.Conv(2 * c.latent_channels, (3, 3), padding=1, dtype=dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents (N, H/f, W/f, Z) -> images (N, H, W, C)."""

    config: AutoencoderKLConfig
    dtype: Any

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c, groups, dtype = self.config, self.config.norm_num_groups, self.dtype
        widths = c.block_out_channels[::-1]
        x = nn.Conv(widths[0], (3, 3), padding=1, dtype=dtype, name="conv_in")(z)
        x = MidBlock(widths[0], groups, c.mid_block_add_attention, dtype, name="mid_block")(x)
        for i, width in enumerate(widths):
            for j in range(c.layers_per_block + 1):
                x = ResnetBlock(width, groups, dtype, name=f"up_blocks_{i}_resnets_{j}")(x)
            if i < len(widths) - 1:
                x = x.repeat(2, axis=1).repeat(2, axis=2)  # nearest neighbour
                x = nn.Conv(width, (3, 3), padding=1, dtype=dtype, name=f"up_blocks_{i}_upsample")(x)
        x = nn.silu(_norm(groups, dtype, "conv_norm_out")(x))
        return nn.Conv(c.out_channels, (3, 3), padding=1, dtype=dtype, name="conv_out")(x)


def _norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    """GroupNorm with two-pass statistics in float32."""
    return nn.GroupNorm(groups, epsilon=NORM_EPS, dtype=dtype, use_fast_variance=False, name=name)


class AutoencoderKL(nn.Module):
    """Encoder and decoder with a diagonal Gaussian posterior. Parameters are float32, computation is `dtype`.

    `model.apply({"params": params}, images, method="encode")` and likewise `method="decode"`.
    """

    config: AutoencoderKLConfig
    dtype: Any = jnp.float32

    @property
    def downsample_factor(self) -> int:
        """Image side over latent side, f."""
        return self.config.downsample_factor

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c, self.dtype)
        self.decoder = Decoder(c, self.dtype)
        if c.use_quant_conv:
            self.quant_conv = nn.Conv(2 * c.latent_channels, (1, 1), dtype=self.dtype)
        if c.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(c.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of the posterior, each (N, H/f, W/f, Z) float32, not yet scaled.

        images: (N, H, W, C) in [-1, 1]. Raises ValueError where f does not divide H and W.
        """
        f, c = self.downsample_factor, self.config
        _check_shape("images", images, c.in_channels)
        if images.shape[1] % f or images.shape[2] % f:
            raise ValueError(f"images have shape {images.shape}; expected height and width divisible by {f}")
        moments = self.encoder(images.astype(self.dtype))
        if c.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE))

    def decode(self, z: jax.Array) -> jax.Array:
        """Images (N, H, W, C) float32, about [-1, 1], of unscaled latents z (N, H/f, W/f, Z).

        Where jax has no other default, products of float32 take "high" precision: more than 8 bits of the operands,
        which is a TPU's default and shows in images of 8 bits.
        """
        _check_shape("latents", z, self.config.latent_channels)
        z = z.astype(self.dtype)
        with jax.default_matmul_precision(jax.config.jax_default_matmul_precision or "high"):  # type: ignore[attr-defined]
            if self.config.use_post_quant_conv:
                z = self.post_quant_conv(z)
            return self.decoder(z).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstruction (N, H, W, C) from the posterior's mean."""
        return self.decode(self.encode(images)[0])


def _check_shape(name: str, x: jax.Array, channels: int) -> None:
    if x.ndim != 4 or x.shape[-1] != channels:
        raise ValueError(f"{name} have shape {x.shape}; expected (batch, height, width, {channels})")
