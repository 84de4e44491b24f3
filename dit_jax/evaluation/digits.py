"""An independent referee for generated digits: a support vector machine that has seen real 8x8 images only.

Legend: N images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dit_jax.data import digits
from dit_jax.evaluation.frechet import frechet_distance

if TYPE_CHECKING:
    from sklearn.svm import SVC


def fit_referee() -> SVC:
    """SVC(gamma=0.001) fitted on the real 8x8 training split; reads 360 of the 364 real test images right."""
    from sklearn.svm import SVC

    return SVC(gamma=0.001).fit(*digits.load_originals("train"))


def class_agreement(referee: SVC, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of pictures (N, 32, 32, C) uint8 that the referee reads as their label (N,)."""
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"{len(images)} images and {len(labels)} labels; expected as many, and at least one")
    return float(np.mean(referee.predict(digits.to_8x8(images)) == labels))


def pixel_frechet(images: np.ndarray, split: digits.Split = "test") -> float:
    """Frechet distance of pictures (N, 32, 32, C) uint8 to the real split, in the referee's 64 features."""
    return frechet_distance(digits.to_8x8(images), digits.load_originals(split)[0])
