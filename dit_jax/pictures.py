"""Pictures as people see them: pixel values to uint8, grids to PNG files."""

from __future__ import annotations

import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.files import whole_file


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Values in [-1, 1] -> uint8 by clip(127.5 x + 128, 0, 255), truncated, as the published sampler does."""
    return np.clip(127.5 * np.asarray(images, np.float32) + 128.0, 0, 255).astype(np.uint8)


def to_uint8_on_device(images: jax.Array) -> jax.Array:
    """The same as `to_uint8`, to the bit, as part of a program.

    A compiler may round a product and a sum once where the host rounds twice. Here only 255 x is rounded before the
    sum, as 256 x - x, of which the product is exact.
    """
    x = jnp.clip(images.astype(jnp.float32), -2.0, 2.0)
    return jnp.clip(0.5 * (256.0 * x - x) + 128.0, 0.0, 255.0).astype(jnp.uint8)


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Images (N, H, W, C) uint8 in rows of `columns` (default: a square grid), `gap` white pixels between."""
    n, h, w, c = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        canvas[top : top + h, left : left + w] = image
    return canvas


def enlargement(side: int) -> int:
    """The whole factor by which pictures of so many pixels are enlarged: under 64 they could hardly be looked at."""
    return max(1, 64 // max(side, 1))


def save_grid(path: str | os.PathLike[str], images: np.ndarray, columns: int | None = None) -> None:
    """Write a grid of images (N, H, W, 1 or 3) uint8 as PNG; the file appears when it is whole.

    Small pictures are enlarged.
    """
    from PIL import Image

    factor = enlargement(images.shape[1])
    large = images.repeat(factor, axis=1).repeat(factor, axis=2)
    canvas = grid(large, columns)
    with whole_file(path) as temporary:
        Image.fromarray(canvas[..., 0] if canvas.shape[-1] == 1 else canvas).save(temporary, format="PNG")
