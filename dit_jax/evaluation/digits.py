"""An independent referee for generated digits: a support vector machine that has seen real 8x8 images only.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dit_jax.config import ConfigError
from dit_jax.data import digits
from dit_jax.evaluation.frechet import frechet_distance

if TYPE_CHECKING:
    from sklearn.svm import SVC

Originals = Callable[[digits.Split], tuple[np.ndarray, np.ndarray]]


def fit_referee(originals: Originals = digits.load_originals) -> SVC:
    """SVC(gamma=0.001) fitted on the real 8x8 training split; reads 360 of the 364 real test images right.

    originals: split -> features (N, 64) and labels (N,), where the digits to be judged are drawn from other features.
    """
    from sklearn.svm import SVC

    return SVC(gamma=0.001).fit(*originals("train"))


def class_agreement(referee: SVC, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of pictures (N, 32, 32, C) uint8 that the referee reads as their label (N,)."""
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"{len(images)} images and {len(labels)} labels; expected as many, and at least one")
    return float(np.mean(referee.predict(digits.to_8x8(images)) == labels))


def pixel_frechet(images: np.ndarray, split: digits.Split = "test") -> float:
    """Frechet distance of pictures (N, 32, 32, C) uint8 to the real split, in the referee's 64 features."""
    return frechet_distance(digits.to_8x8(images), digits.load_originals(split)[0])


def report(images: np.ndarray, labels: np.ndarray) -> str:
    """What the referee says of generated digits, beside real ones, as text. Raises ConfigError for other samples."""
    if len(images) < 2:
        raise ConfigError(
            f"the samples are {len(images)}; expected at least 2, a distance needs their covariance"
        )
    if (
        images.shape[1:3] != (digits.SIZE, digits.SIZE)
        or labels.min() < 0
        or labels.max() >= digits.NUM_CLASSES
    ):
        raise ConfigError(
            f"the samples have shape {images.shape} and labels {labels.min()} to {labels.max()}; "
            f"expected {digits.SIZE}x{digits.SIZE} digits of classes 0 to {digits.NUM_CLASSES - 1}"
        )
    referee = fit_referee()
    real, real_labels = digits.load_originals("test")
    train, _ = digits.load_originals("train")
    real_share = float(np.mean(referee.predict(real) == real_labels))
    return (
        f"{len(images)} generated digits, judged by a classifier fitted on real ones:\n"
        f"  read as the class asked for   {class_agreement(referee, images, labels):7.1%}"
        f"   (real test digits {real_share:.1%})\n"
        f"  Frechet distance to real test {pixel_frechet(images):7.2f}"
        f"   (real training digits {frechet_distance(train, real):.2f}; 64 pixel features)"
    )
