"""The embedded image dataset: scikit-learn's 1,797 handwritten digits, as 32x32 pictures.

The data (Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998) were made from 32x32
bitmaps by counting the ink in every 4x4 block, which gives 8x8 pixels of 0..16. `load_digits` goes the other
way: a smooth 32x32 picture whose blocks hold that much ink.

Legend: N images.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Split = Literal["train", "test"]

SIZE = 32  # side of a picture
NUM_CLASSES = 10
MAX_INK = 16.0  # a full block of 4x4 pixels
TEST_SHARE = 5  # every fifth image of a class is a test image

_SHARPNESS = 8.0  # slope of the edge between ink and paper; higher is closer to a bitmap
_ROUNDS = 30


def load_originals(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The real 8x8 images as features (N, 64) float64 in 0..16, and labels (N,) int32.

    The split is fixed and stratified: of each class, the first image and every fifth after it is for testing
    (1,433 training and 364 test images).
    """
    import sklearn.datasets

    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    features, labels = sklearn.datasets.load_digits(return_X_y=True)
    test = np.zeros(len(labels), bool)
    for label in range(NUM_CLASSES):
        test[np.flatnonzero(labels == label)[::TEST_SHARE]] = True
    chosen = test if split == "test" else ~test
    return features[chosen], labels[chosen].astype(np.int32)


def load_digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 32, 32, 3) uint8, white on black with equal channels, and labels (N,) int32."""
    features, labels = load_originals(split)
    return draw(features), labels


def draw(features: np.ndarray) -> np.ndarray:
    """Pictures (N, 32, 32, 3) uint8, white on black with equal channels, of features (N, 64) in 0..16."""
    pictures = np.round(255 * _restore(features.reshape(-1, 8, 8) / MAX_INK)).astype(np.uint8)
    return np.repeat(pictures[..., None], 3, axis=-1)


def to_8x8(images: np.ndarray) -> np.ndarray:
    """Pictures (N, 32, 32[, C]) uint8 -> features (N, 64) in 0..16, the mean ink of 4x4 blocks."""
    if images.shape[1:3] != (SIZE, SIZE) or images.ndim not in (3, 4) or images.dtype != np.uint8:
        raise ValueError(
            f"images have shape {images.shape} and type {images.dtype}; expected (N, 32, 32, C) uint8"
        )
    gray = images.astype(np.float64).reshape(len(images), SIZE, SIZE, -1).mean(axis=-1)
    return _blocks(gray).reshape(len(images), 64) * (MAX_INK / 255)


def _blocks(pictures: np.ndarray) -> np.ndarray:
    """Means of 4x4 blocks: (N, 32, 32) -> (N, 8, 8)."""
    return pictures.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))


def _restore(ink: np.ndarray) -> np.ndarray:
    """Pictures (N, 32, 32) in [0, 1] whose block means are close to ink (N, 8, 8).

    Back-projection (Irani and Peleg, 1991): enlarge the blocks' error and take it off, again and again, with
    a sigmoid that keeps the strokes' edges crisp.
    """
    from PIL import Image

    eye = Image.fromarray(np.eye(8, dtype=np.float32))
    enlarge = np.asarray(eye.resize((8, SIZE), Image.Resampling.BICUBIC), np.float64)  # (32, 8), one axis

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-_SHARPNESS * (x - 0.5)))

    x = enlarge @ ink @ enlarge.T  # (N, 32, 32)
    for _ in range(_ROUNDS):
        error = ink - _blocks(sigmoid(x))
        x = np.clip(x + 0.5 * (enlarge @ error @ enlarge.T), -0.3, 1.3)
    return sigmoid(x)
