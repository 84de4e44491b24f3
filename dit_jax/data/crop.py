"""The centre crop of ADM (arXiv 2105.05233) and DiT: halve with a box filter, then bicubic, then crop."""

from __future__ import annotations

import numpy as np
from PIL import Image

CROP = "adm_center"


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre square of an RGB image, scaled so that its shorter side is `size`: (size, size, 3) uint8.

    The box filter halves the image while its shorter side is at least twice `size`, so that bicubic
    interpolation, which looks at few pixels, does not alias.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    # Only the pixels of the crop are computed: a long thin image would take gigabytes.
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
