"""Samples between two others, from a picture or around a part of one, and the way of a sample as an animation.

Letters: N samples, S steps, H and W latent sides, C latent channels, h and w sides of a picture.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import paths
from dit_jax.compiler import compiler_options
from dit_jax.config import Config, ConfigError
from dit_jax.data.crop import center_crop
from dit_jax.diffusion.create import create_process
from dit_jax.files import whole_file
from dit_jax.generation.decoding import Decoder
from dit_jax.generation.sampling import SamplingOptions, Told, device_mesh, guided_network
from dit_jax.models.autoencoder_kl import AutoencoderKL, to_latents
from dit_jax.models.create import Model
from dit_jax.pictures import enlargement, grid, save_grid
from dit_jax.samplers.editing import Given, Way, moments, spherical, way
from dit_jax.samplers.noise import sample_keys, start_noise

Array = jax.Array
STRIP = 10  # pictures of a sample in a strip
SHOWN = 4  # samples in a strip and in an animation
FRAME_MS, LAST_FRAME_MS = 120, 1500


@dataclass(frozen=True)
class Editing:
    """What is asked of the samples beside their labels.

    Attributes: `between` the indices of two samples, in whose start noises the others lie; `strength` the share of
    the steps that a given picture leaves.
    """

    between: tuple[int, int] | None = None
    strength: float = 1.0


@functools.lru_cache(maxsize=8)
def make_way_sampler(
    model: Model, config: Config, options: SamplingOptions, editing: Editing, guide: Model | None = None
) -> Callable[[Any, int, np.ndarray, Told, Given | None], Way]:
    """A jitted (params, seed, sample indices (N,), what N are told, what is given) -> all states, on one device."""
    process, mesh = create_process(config.diffusion), device_mesh(1)
    choice = options.choice(process)

    def sample(params: Any, seed: Array, indices: Array, told: Told, given: Given | None) -> Way:
        keys = sample_keys(jax.random.key(seed), indices)
        size = (*model.latent_size, model.in_channels)
        if editing.between is None:
            noise = start_noise(keys, size)
        else:
            ends = sample_keys(jax.random.key(seed), jnp.asarray(editing.between))
            first, last = start_noise(ends, size)
            noise = spherical(first, last, jnp.linspace(0.0, 1.0, len(indices)))
            keys = jnp.repeat(ends[:1], len(indices), axis=0)  # of the noise on the way, the same for all
        denoise = guided_network(process, config, options, model, params, told, guide, mesh)
        return way(process, denoise, noise, keys, choice=choice, given=given, strength=editing.strength)

    return jax.jit(sample, compiler_options=compiler_options(mesh))


def encode(vae: AutoencoderKL, params: Any, image: np.ndarray, scaling: float, shift: float) -> Array:
    """The latent (1, H, W, C) of a picture (h, w, 3) uint8: the mean of its posterior."""
    pixels = jnp.asarray(image, jnp.float32)[None] / 127.5 - 1.0
    apply = jax.jit(functools.partial(vae.apply, method="encode"))
    mean: Any = apply({"params": params}, pixels)[0]
    return to_latents(mean, scaling, shift)


def read_picture(option: str, path: str, side: int, mode: str = "RGB") -> np.ndarray:
    """The centre square of a picture in a file that `option` names, (side, side, 3) uint8."""
    from PIL import Image

    try:
        with paths.local_file(paths.to_path(path)) as here, Image.open(here) as image:
            return center_crop(image.convert(mode).convert("RGB"), side)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{option} names {path}, which is no picture ({error}); expected a PNG or JPEG"
        ) from None


def kept_part(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where a latent of `size` (H, W) is kept, (1, H, W, 1) float32: where nothing of the mask (h, w, 3) is white."""
    (h, w), white = size, mask.mean(axis=-1) > 127.5
    blocks = white.reshape(h, white.shape[0] // h, w, white.shape[1] // w)
    return 1.0 - blocks.any(axis=(1, 3))[None, :, :, None].astype(np.float32)


def strip_of(path: paths.Named) -> pathlib.Path:
    """The file of the strip beside an animation's."""
    return paths.to_path(str(path).removesuffix(".gif") + "_strip.png")


def save_way(path: paths.Named, found: Way, decoder: Decoder) -> pathlib.Path:
    """An animated GIF of the first samples, state beside predicted clean latent, and a strip of both as PNG.

    Returns the strip's file.
    """
    from PIL import Image

    states, x0 = (np.asarray(part)[:, :SHOWN] for part in found)
    count = states.shape[1]
    # Decoded moment by moment: a moment's pictures fit in memory, those of all may not.
    pairs = [(np.asarray(decoder(a)), np.asarray(decoder(b))) for a, b in zip(states, x0, strict=True)]
    frames = []
    for now, clean in pairs:
        factor = enlargement(now.shape[1])
        both = np.stack([now, clean], axis=1).reshape(-1, *now.shape[1:])
        frames.append(Image.fromarray(grid(both.repeat(factor, axis=1).repeat(factor, axis=2), columns=2)))
    with whole_file(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], loop=0,
            duration=[FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS],
        )  # fmt: skip
    chosen = moments(len(pairs) - 1, STRIP)
    rows = [pairs[m][kind][sample] for sample in range(count) for kind in (0, 1) for m in chosen]
    strip = strip_of(path)
    save_grid(strip, np.stack(rows), columns=len(chosen))
    return strip
