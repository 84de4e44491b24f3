"""Where images come from: anything that gives record i as an RGB picture with an id and a label."""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
from PIL import Image

from dit_jax.data.metadata import DataError


class BadImageError(Exception):
    """One record cannot be decoded; the message says why."""


class Source(Protocol):
    """Images with labels, by index, in a fixed order. Worker processes get a pickled copy."""

    name: str
    """As in the metadata, such as `folder:flowers`."""
    num_classes: int
    """0 for an unlabelled source."""
    label_names: tuple[str, ...]
    """Name of each class; empty where there are none."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """SHA-256 over what identifies the records: their ids and sizes, or their bytes."""

    def id(self, index: int) -> str:
        """A name of the record that a person can find it by."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The record as an RGB image and its label (0 without labels). Raises BadImageError."""


class ArraySource:
    """Images (N, H, W, 3) or (N, H, W) uint8 in memory and labels (N,), or none."""

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        label_names: tuple[str, ...] = (),
    ):
        self.name, self.label_names = name, label_names
        self.images, self.labels = images, labels
        self.num_classes = len(label_names) or (0 if labels is None else int(labels.max()) + 1)

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.images.tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype(np.int64).tobytes())
        return digest.hexdigest()

    def id(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> tuple[Image.Image, int]:
        label = 0 if self.labels is None else int(self.labels[index])
        return Image.fromarray(self.images[index]).convert("RGB"), label


def open_source(name: str) -> Source:
    """The source of that name: `digits`.

    Raises DataError where there is no such source.
    """
    if name == "digits":
        from dit_jax.data.digits import load_digits

        images, labels = load_digits("train")
        return ArraySource("digits", images, labels, tuple("0123456789"))
    raise DataError(f"--source is {name!r}; expected digits")
