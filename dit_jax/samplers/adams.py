"""Euler and Adams-Bashforth: the ODE by the polynomial through the latest slopes, on any grid.

Order 1 is Euler. On a Gaussian process the ODE is d(x / alpha) / d(sigma / alpha) = noise: Euler is then DDIM without
noise, and the higher orders are the rho-AB methods of DEIS (Zhang & Chen, arXiv 2204.13902).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from dit_jax.samplers.course import Course, times_at
from dit_jax.samplers.loop import Denoiser
from dit_jax.samplers.multistep import Row, advance, nothing_yet, padded

Array = jax.Array


@dataclass(frozen=True)
class AdamsBashforth:
    """Of order 1 to 4; the first steps are of lower orders, while fewer slopes are of use."""

    order: int = 1
    evaluations: int = 1
    draws: bool = False

    def last(self, course: Course, end: float) -> None:
        """It takes all steps."""

    def rows(self, course: Course, times: np.ndarray) -> Row:
        """Weights of slopes, (S, order)."""
        scale, u = course.coordinates(times)
        weights, known, smooth = [], 0, course.smooth(times)
        for i in range(len(times) - 1):
            known = known + 1 if smooth[i] else 0
            nodes = u[i - max(min(self.order, known), 1) + 1 : i + 1][::-1]
            weights.append(scale[i + 1] * integral_weights(nodes, u[i + 1]))
        steps = len(times) - 1
        return Row(
            times_at(course, times[:-1]), scale[1:] / scale[:-1], padded(weights, self.order), np.zeros(steps)
        )

    def begin(self, x: Array) -> tuple[Array, ...]:
        """Earlier slopes, newest first."""
        return nothing_yet(x, self.order - 1)

    def step(
        self, denoiser: Denoiser, x: Array, carry: tuple[Array, ...], row: Row, noise: Array | None
    ) -> tuple[Array, tuple[Array, ...]]:
        """One evaluation, at the start of the step."""
        return advance(x, denoiser.slope(x, row.here), carry, row, None)


def integral_weights(nodes: np.ndarray, end: float) -> np.ndarray:
    """Weights (K,) of a function's values at nodes in its integral from nodes[0] to end: exact up to degree K - 1."""
    width = end - nodes[0]
    powers = np.arange(len(nodes))
    return width * np.linalg.solve(((nodes - nodes[0]) / width) ** powers[:, None], 1 / (powers + 1))
