"""Features of pictures: what makes them, and what the metrics need of a set of pictures.

A feature has a name: `pool` (for FID, KID, precision and recall), `spatial` (for sFID), `logits` (for the Inception
Score), `read` (the class that a referee reads). An extractor gives some of them.

Legend: B pictures at once, N pictures of a set, h and w their sides in pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dit_jax.config import ConfigError
from dit_jax.evaluation.statistics import RunningStatistics

STATISTICS = ("pool", "spatial")
"""Features of which mean and covariance are kept."""
ROWS = ("pool", "logits", "read")
"""Features that are kept of every picture."""


@dataclass(frozen=True)
class FeatureExtractor:
    """What makes features of pictures, on this process's devices.

    name: as in results, such as `inception` or `digits`. convention: how pictures are resized for it. weights_hash:
    SHA-256 of its weights, None where it has none. run: (B, h, w, 3) uint8 -> name of a feature -> (B, F) or (B,).
    side: of the pictures that it takes, None for any.
    """

    name: str
    convention: str
    weights_hash: str | None
    run: Callable[[np.ndarray], dict[str, np.ndarray]]
    side: int | None = None

    def check(self, what: str, shape: tuple[int, ...]) -> None:
        """Raises ConfigError where it does not take pictures (N, h, w, C) of this shape; `what` has them."""
        if self.side is not None and shape[1:3] != (self.side, self.side):
            raise ConfigError(
                f"{what} has pictures of {shape[1]}x{shape[2]} pixels; the {self.name} features are of "
                f"{self.side}x{self.side}"
            )

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features of pictures (B, h, w, 3) uint8. Raises ValueError for other arrays."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
            raise ValueError(
                f"images have shape {images.shape} and type {images.dtype}; expected (B, h, w, 3) uint8"
            )
        return self.run(images)


class Features:
    """Features of a set of pictures that come in batches, by any process and in any order.

    Each picture has a number, its place in the set: rows are handed out in the order of the numbers.
    """

    def __init__(self) -> None:
        self.statistics: dict[str, RunningStatistics] = {}
        """Of each feature in STATISTICS that has come."""
        self._index: list[np.ndarray] = []
        self._rows: dict[str, list[np.ndarray]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._index))

    def add(self, index: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
        """Take in what an extractor gave for the pictures of these numbers (B,)."""
        for name in STATISTICS:
            if name in found:
                values = found[name]
                self.statistics.setdefault(name, RunningStatistics(values.shape[1])).add(values)
        self._extend(index, {name: found[name] for name in ROWS if name in found})

    def merge(self, other: Features) -> None:
        """Take in what another process, or an earlier one, has made."""
        for name, theirs in other.statistics.items():
            self.statistics.setdefault(name, RunningStatistics(theirs.dim)).merge(theirs)
        if len(other):
            self._extend(other.index, {name: other.rows(name) for name in other._rows})

    def _extend(self, index: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        if len(self) and rows.keys() != self._rows.keys():
            raise ValueError(f"features are {', '.join(rows)}; expected {', '.join(self._rows)}, as before")
        self._index.append(np.asarray(index, np.int64))
        for name, values in rows.items():
            # A copy: the extractor's own array may be a view of a larger one.
            self._rows.setdefault(name, []).append(np.array(values))

    @property
    def index(self) -> np.ndarray:
        """Numbers (N,) of the pictures, ascending."""
        return np.sort(np.concatenate([*self._index, np.zeros(0, np.int64)]))

    def has(self, name: str) -> bool:
        """Whether every picture's feature of that name is kept."""
        return name in self._rows

    def rows(self, name: str) -> np.ndarray:
        """The feature of every picture, (N, F) or (N,), in the order of their numbers."""
        order = np.argsort(np.concatenate(self._index), kind="stable")
        return np.concatenate(self._rows[name])[order]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays to store; `from_arrays` reads them back."""
        arrays = {"index": self.index} | {f"rows/{name}": self.rows(name) for name in self._rows}
        for name, statistics in self.statistics.items():
            arrays |= {f"{name}/{key}": value for key, value in statistics.to_arrays().items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Features:
        """The inverse of `to_arrays`."""
        found = cls()
        for name in STATISTICS:
            if f"{name}/count" in arrays:
                parts = {key: arrays[f"{name}/{key}"] for key in ("count", "mean", "scatter")}
                found.statistics[name] = RunningStatistics.from_arrays(parts)
        rows = {name: arrays[f"rows/{name}"] for name in ROWS if f"rows/{name}" in arrays}
        if len(arrays["index"]):
            found._extend(arrays["index"], rows)
        return found


def features_of(
    extractor: FeatureExtractor,
    images: np.ndarray,
    batch_size: int = 256,
    told: Callable[[int], object] | None = None,
) -> Features:
    """Features of pictures (N, h, w, 3) uint8, numbered as they lie. told: is called with the size of every batch."""
    found = Features()
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        found.add(np.arange(start, start + len(batch)), extractor(batch))
        if told is not None:
            told(len(batch))
    return found


def joined(parts: Sequence[Features]) -> Features:
    """All parts of a set as one. Raises ValueError where a picture is in two of them."""
    whole = Features()
    for part in parts:
        whole.merge(part)
    if len(np.unique(whole.index)) != len(whole):
        raise ValueError(
            f"{len(whole)} features of {len(np.unique(whole.index))} pictures; expected one of each"
        )
    return whole


def digits_extractor() -> FeatureExtractor:
    """The referee of the digits: `pool` are the 64 pixels of 8x8 pictures, `read` the class that it reads (B,).

    Takes pictures of 32x32 pixels.
    """
    from dit_jax.data import digits
    from dit_jax.evaluation.digits import fit_referee

    referee = fit_referee()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        pixels = digits.to_8x8(images)
        return {"pool": pixels.astype(np.float32), "read": referee.predict(pixels).astype(np.int32)}

    return FeatureExtractor("digits", "8x8 pixels", None, run, digits.SIZE)
