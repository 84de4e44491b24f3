"""Pictures as people see them: pixel values to uint8, grids to PNG files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

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


def save_grid(
    path: str | os.PathLike[str],
    images: np.ndarray,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Write a grid of images (N, H, W, 1 or 3) uint8 as PNG; the file appears when it is whole.

    Small pictures are enlarged. captions: N texts, each of which stands under its picture, in a few lines.
    """
    from PIL import Image

    width = images.shape[2]
    factor = enlargement(images.shape[1]) if captions is None else max(1, round(READABLE / max(width, 1)))
    large = images.repeat(factor, axis=1).repeat(factor, axis=2)
    if captions is None:
        canvas = grid(large, columns)
    else:
        if len(captions) != len(images):
            raise ValueError(f"{len(images)} images have {len(captions)} captions; expected one for each")
        canvas = captioned_grid(large, captions, columns)
    with whole_file(path) as temporary:
        Image.fromarray(canvas[..., 0] if canvas.shape[-1] == 1 else canvas).save(temporary, format="PNG")


# ------------------------------------------------------------------------------------------ captions

READABLE = 144  # pixels along a picture with a caption: three words a line
LINES = 4  # of a caption at most
_INK = (40, 40, 40)


def captioned_grid(images: np.ndarray, captions: Sequence[str], columns: int | None = None) -> np.ndarray:
    """Images (N, H, W, 1 or 3) uint8 in rows, each with its caption under it, dark on white: (h, w, 3)."""
    from PIL import Image, ImageDraw

    n, h, w, _ = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    font = _font(min(max(11, w // 12), 15))
    pad = max(6, w // 18)
    line = sum(font.getmetrics())
    wrapped = [wrap(caption, w, font.getlength) for caption in captions]
    rows = [wrapped[first : first + columns] for first in range(0, n, columns)]
    heights = [h + pad // 2 + line * max(map(len, row)) + pad for row in rows]
    canvas = Image.new("RGB", (columns * (w + pad) + pad, sum(heights) + pad), "white")
    draw, top = ImageDraw.Draw(canvas), pad
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for i, lines in enumerate(row):
            left = pad + i * (w + pad)
            image = images[number * columns + i]
            canvas.paste(Image.fromarray(np.broadcast_to(image, (h, w, 3)).copy()), (left, top))
            for j, words in enumerate(lines):
                at = (left + w / 2, top + h + pad // 2 + j * line)
                draw.text(at, words, fill=_INK, font=font, anchor="ma")
        top += height
    return np.asarray(canvas)


def wrap(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """A text in at most LINES lines of `width`, as `length` measures them; what is left out shows as an ellipsis.

    A word that is longer than a line is cut.
    """
    most = 64 * LINES  # letters: beyond, there is nothing to measure
    printable = "".join(c if c.isprintable() else " " for c in text[: 4 * most])
    lines, rest, cut = [""], printable.split(), len(text) > 4 * most
    while rest and len(lines) <= LINES:
        word = rest.pop(0)
        longer = f"{lines[-1]} {word}".strip()
        if length(longer) <= width:
            lines[-1] = longer
        elif lines[-1]:
            lines.append("")
            rest.insert(0, word)
        else:
            fits = next((n for n in range(len(word) - 1, 0, -1) if length(word[:n]) <= width), 1)
            lines[-1] = word[:fits]
            lines.append("")
            rest.insert(0, word[fits:])
    if len(lines) > LINES or cut:
        lines = lines[:LINES]
        while lines[-1] and length(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines


def _font(size: int) -> Any:
    """DejaVu Sans as it comes with matplotlib: it has more of the world's letters than Pillow's own."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
