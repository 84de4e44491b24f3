"""Heun's method: Euler to the next time, then again with the mean of the slopes at both ends.

On flow matching as in SiT (arXiv 2401.08740), on a Gaussian process as Karras et al. have it (arXiv 2206.00364,
algorithm 1): in x / alpha by sigma / alpha, the last step, to the data, Euler's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from dit_jax.samplers.adams import AdamsBashforth
from dit_jax.samplers.course import Course, Times, times_at
from dit_jax.samplers.loop import Denoiser

Array = jax.Array


class Row(NamedTuple):
    """A step between two times: x becomes keep x + width slope; second is the share of the second slope."""

    here: Times
    there: Times
    keep: Any
    width: Any
    second: Any


@dataclass(frozen=True)
class Heun:
    """Second order, two evaluations a step."""

    evaluations: int = 2
    draws: bool = False

    def last(self, course: Course, end: float) -> AdamsBashforth | None:
        """Euler, where there is no slope at the end."""
        return None if course.answers(end) else AdamsBashforth()

    def rows(self, course: Course, times: np.ndarray) -> Row:
        """The two ends of each step."""
        scale, u = course.coordinates(times)
        here, there = times_at(course, times[:-1]), times_at(course, times[1:])
        second = np.where(course.smooth(times[:-1]), 0.5, 0.0)
        return Row(here, there, scale[1:] / scale[:-1], scale[1:] * np.diff(u), second)

    def begin(self, x: Array) -> None:
        """Nothing is carried."""

    def step(
        self, denoiser: Denoiser, x: Array, carry: None, row: Row, noise: Array | None
    ) -> tuple[Array, None]:
        """The second slope is that at Euler's guess."""
        slope = denoiser.slope(x, row.here)
        guess = row.keep * x + row.width * slope
        mean = slope + row.second * (denoiser.slope(guess, row.there) - slope)
        return row.keep * x + row.width * mean, None
