"""From latents to pictures: the autoencoder of a run, decoding as many at once as its devices hold.

Letters: B pictures, D devices, H and W latent sides, C latent channels, h and w sides of a picture.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import Config, ConfigError
from dit_jax.data.metadata import LatentMetadata
from dit_jax.memory import device_memory
from dit_jax.models.autoencoder_kl import AutoencoderKL, from_latents
from dit_jax.pictures import to_uint8_on_device

Array = jax.Array
Decoder = Callable[[Any], Any]
"""Scaled latents (B, H, W, C) -> images (B, h, w, 3) uint8, computed on this process's devices: whoever reads the
result waits for it."""

# What the decoder of Stable Diffusion needs beside its weights, 9 GiB for 64 pictures of 256x256 on a TPU, is as much
# as 4.5 float32 arrays of its finest layer, 128 channels wide.
ARRAYS_AT_ONCE = 4.5
SHARE_OF_MEMORY = (
    0.25  # of a device's: the network's weights, a batch of samples and pictures are there as well
)


def pictures_at_once(width: int, pixels: int, memory: int | None = None) -> int | None:
    """How many pictures of so many pixels a device decodes at once; `width`: channels of the decoder's finest layer.

    memory: bytes of a device, None: of those here. None where that is not known.
    """
    room = memory or device_memory()
    return (
        None if room is None else max(1, int(SHARE_OF_MEMORY * room / (ARRAYS_AT_ONCE * 4 * width * pixels)))
    )


def make_decoder(
    vae: AutoencoderKL,
    vae_params: Any,
    scaling_factor: float,
    shift_factor: float,
    at_once: int | None = None,
) -> Decoder:
    """A decoder that splits the batch over the local devices.

    at_once: pictures that a device decodes at a time, None: as many as fit.
    """
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), ("batch",))
    split, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    placed = jax.device_put(vae_params, whole)

    def decode(params: Any, latents: Array) -> Array:
        z = from_latents(latents, scaling_factor, shift_factor)
        images: Any = vae.apply({"params": params}, z, method="decode")
        return to_uint8_on_device(images)

    @functools.partial(jax.jit, static_argnums=2, out_shardings=split)
    def in_parts(params: Any, latents: Array, parts: int) -> Array:
        if parts == 1:
            return decode(params, latents)

        def one_device(params: Any, own: Array) -> Array:
            done = jax.lax.map(functools.partial(decode, params), own.reshape(parts, -1, *own.shape[1:]))
            return done.reshape(-1, *done.shape[2:])

        specs = (whole.spec, split.spec)
        return jax.shard_map(one_device, mesh=mesh, in_specs=specs, out_specs=split.spec)(params, latents)

    def to_images(latents: Any) -> Array:
        pixels = latents.shape[1] * latents.shape[2] * vae.config.downsample_factor**2
        own = -(-len(latents) // len(devices))
        most = at_once or pictures_at_once(vae.config.block_out_channels[0], pixels) or own
        parts = -(-own // most)
        padding = len(devices) * parts * -(-own // parts) - len(latents)
        if padding:
            latents = np.pad(np.asarray(latents), [(0, padding)] + [(0, 0)] * (latents.ndim - 1))
        images = in_parts(placed, jax.device_put(latents, split), parts)
        return images[: len(images) - padding] if padding else images

    return to_images


@functools.lru_cache(maxsize=2)
def load_decoder(
    metadata: LatentMetadata, vae: str | os.PathLike[str] | None = None, at_once: int | None = None
) -> Decoder:
    """The decoder of a dataset's latents; `vae` says where its autoencoder lies now, if it has moved.

    Raises ConfigError for an autoencoder that cannot be read, or that has other weights than the one the dataset was
    encoded by.
    """
    vae_model, params = load_vae(metadata, vae)
    return make_decoder(vae_model, params, metadata.scaling_factor, metadata.shift_factor, at_once)


def check_decoder(option: str, value: int, config: Config, metadata: LatentMetadata) -> None:
    """Raises ConfigError, naming the option that asks a run for pictures, where there could be none."""
    try:
        load_decoder(metadata, config.data.vae or None)
    except ConfigError as error:
        raise ConfigError(
            f"{option} is {value}, but {error}; expected 0, or --data.vae, where the autoencoder lies"
        ) from None


def load_vae(
    metadata: LatentMetadata, vae: str | os.PathLike[str] | None = None
) -> tuple[AutoencoderKL, Any]:
    """The autoencoder and its parameters; arguments and errors as of `load_decoder`."""
    from dit_jax.interop.diffusers import load_autoencoder_kl, weights_hash

    place = vae or metadata.vae
    try:
        found = weights_hash(place)
        model, params = load_autoencoder_kl(place)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the dataset's autoencoder cannot be read: {error}") from None
    if metadata.vae_hash and found != metadata.vae_hash:
        raise ConfigError(
            f"the autoencoder {place} has weights {found[:12]}; the latents were encoded by {metadata.vae} "
            f"with weights {metadata.vae_hash[:12]}"
        )
    return model, params
