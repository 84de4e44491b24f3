"""Mean and covariance of rows that come chunk by chunk, from one process or from many.

Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance" (1983), equation 1.5, for vectors.

Legend: N rows, F features.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class RunningStatistics:
    """Count, mean (F,) and scatter matrix (F, F), the sum of (x - mean) (x - mean)^T, of rows, in float64.

    Neither the order of the rows nor how they are cut into chunks changes them by more than rounding.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    @property
    def dim(self) -> int:
        """Features F of a row."""
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """Covariance (F, F) with N - 1 in the denominator, as np.cov. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"statistics are of {self.count} rows; expected at least 2")
        return self.scatter / (self.count - 1)

    def add(self, rows: np.ndarray) -> None:
        """Take rows (N, F) in. Raises ValueError for another shape and for values that are not finite."""
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"rows have shape {rows.shape}; expected (N, {self.dim})")
        if len(rows) == 0:
            return
        rows = rows.astype(np.float64)
        mean = rows.mean(axis=0)
        if not np.isfinite(mean).all():
            raise ValueError("rows hold values that are not finite")
        centred = rows - mean
        self._take(len(rows), mean, centred.T @ centred)

    def merge(self, other: RunningStatistics) -> None:
        """Take in what another one has seen."""
        if other.dim != self.dim:
            raise ValueError(f"statistics of {other.dim} features; expected {self.dim}")
        if other.count:
            self._take(other.count, other.mean, other.scatter)

    def __add__(self, other: RunningStatistics) -> RunningStatistics:
        both = RunningStatistics(self.dim)
        both.merge(self)
        both.merge(other)
        return both

    def _take(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        step = mean - self.mean
        self.mean = self.mean + step * (count / total)
        self.scatter = self.scatter + scatter + np.outer(step, step) * (self.count * count / total)
        self.count = total

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays to store; `from_arrays` reads them back to equal statistics."""
        return {"count": np.int64(self.count), "mean": self.mean, "scatter": self.scatter}  # type: ignore[dict-item]

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> RunningStatistics:
        """The inverse of `to_arrays`."""
        found = cls(len(arrays["mean"]))
        found.count = int(arrays["count"])
        found.mean, found.scatter = np.array(arrays["mean"]), np.array(arrays["scatter"])
        return found
