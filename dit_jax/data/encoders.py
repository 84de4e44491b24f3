"""Images to moments of a VAE's posterior, on all local devices.

Legend: B images in a call, S image side, M views (1, or 2: image and mirror image), h, w latent height and
width, c latent channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import Precision
from dit_jax.data.metadata import DataError, MomentsType

Moments = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Encoder:
    """A VAE's encoder with what the metadata says of it."""

    vae: str
    """The autoencoder as it was named: a diffusers folder, a hub id, or `digits`."""
    vae_hash: str
    """SHA-256 of its weights file."""
    backend: Literal["flax", "diffusers"]
    precision: Precision
    scaling_factor: float
    shift_factor: float
    factor: int
    """Image side over latent side."""
    channels: int
    """Latent channels c."""
    devices: int
    """Devices that share a call's images."""
    compile: Callable[[bool, MomentsType], Moments]
    """(mirrors, dtype) -> a function of images (B, S, S, 3) uint8 that gives moments (B, M, h, w, 2c), mean
    then
    standard deviation, perhaps still being computed. B must be a multiple of `devices`."""


def flax_encoder(vae: str | os.PathLike[str], precision: Precision = "float32") -> Encoder:
    """The Flax port of a diffusers AutoencoderKL (folder, hub id or `digits`), on all local devices.

    Raises DataError where there is no such autoencoder or its files do not fit.
    """
    from dit_jax.interop.diffusers import load_autoencoder_kl, weights_hash

    try:
        model, params = load_autoencoder_kl(vae)
        vae_hash = weights_hash(vae)
    except (OSError, ValueError) as error:
        raise DataError(f"--vae: {error}") from None
    model = model.clone(dtype=jnp.dtype(precision))
    config = model.config

    def encode(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        # On an accelerator float32 convolutions would otherwise run in TF32 or bfloat16.
        with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
            return model.apply({"params": params}, images, method="encode")  # type: ignore[return-value]

    return Encoder(
        vae=os.fspath(vae),
        vae_hash=vae_hash,
        backend="flax",
        precision=precision,
        scaling_factor=float(config.scaling_factor),
        shift_factor=float(config.shift_factor or 0.0),
        factor=model.downsample_factor,
        channels=config.latent_channels,
        devices=jax.local_device_count(),
        compile=compile_encode(encode, params),
    )


def compile_encode(
    encode: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]], params: Any
) -> Callable[[bool, MomentsType], Moments]:
    """Split a jitted encode(params, images in [-1, 1]) -> (mean, std) over the local devices; see
    Encoder.compile.

    Each device runs a program of its own share's size, so the moments do not depend on how many devices
    there are.
    """
    mesh = Mesh(np.array(jax.local_devices()), ("batch",))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    params = jax.device_put(params, everywhere)

    def compiled(mirrors: bool, dtype: MomentsType) -> Moments:
        def moments(params: Any, images: jax.Array) -> jax.Array:
            images = images.astype(jnp.float32) / 127.5 - 1.0
            views = (images, images[:, :, ::-1]) if mirrors else (images,)
            stacked = jnp.stack([jnp.concatenate(encode(params, view), axis=-1) for view in views], axis=1)
            return stacked.astype(dtype)

        run = jax.jit(moments, in_shardings=(everywhere, split), out_shardings=split)
        return lambda images: run(params, jax.device_put(images, split))

    return compiled


def diffusers_encoder(vae: str | os.PathLike[str], precision: Precision = "float32") -> Encoder:
    """diffusers' own torch class, on a GPU where torch sees one. Raises DataError where it cannot be loaded."""
    from dit_jax.interop.diffusers import asset_path, weights_hash

    try:
        import diffusers
        import torch
    except ImportError as error:
        raise DataError(
            f"--vae-backend is diffusers, but {error}; expected pip install 'dit_jax[interop]'"
        ) from None
    place = asset_path("digits_vae") if os.fspath(vae) == "digits" else vae
    try:
        model = diffusers.AutoencoderKL.from_pretrained(place, torch_dtype=getattr(torch, precision))
        vae_hash = weights_hash(vae)
    except (OSError, ValueError) as error:
        raise DataError(f"--vae: {error}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.eval().to(device)

    def compiled(mirrors: bool, dtype: MomentsType) -> Moments:
        @torch.inference_mode()
        def moments(images: np.ndarray) -> np.ndarray:
            x = (torch.from_numpy(images).to(device).permute(0, 3, 1, 2) / 127.5 - 1.0).to(model.dtype)
            views = (x, x.flip(-1)) if mirrors else (x,)
            posteriors = [model.encode(view).latent_dist for view in views]
            stacked = torch.stack([torch.cat([p.mean, p.std], dim=1) for p in posteriors], dim=1)
            return stacked.permute(0, 1, 3, 4, 2).float().cpu().numpy().astype(dtype)

        return moments

    config = model.config
    return Encoder(
        vae=os.fspath(vae),
        vae_hash=vae_hash,
        backend="diffusers",
        precision=precision,
        scaling_factor=float(config.scaling_factor),
        shift_factor=float(config.shift_factor or 0.0),
        factor=2 ** (len(config.block_out_channels) - 1),
        channels=config.latent_channels,
        devices=1,
        compile=compiled,
    )
