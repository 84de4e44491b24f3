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
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]
