"""DPM-Solver++: exponential integrators of the predicted x0 in lambda = log(alpha / sigma).

Lu et al., arXiv 2211.01095: the multistep solver of second order (2M, algorithm 2), of third order (3M, by the same
expansion), and of second order for the SDE (2M-SDE, section 5, eq. 18). With h the step in lambda and D the
differences of x0 over earlier steps,

    x' = (sigma' / sigma) x + alpha' (1 - e^-h) D0 + alpha' (e^-h - 1 + h) / h D1 + ...

where 2M takes half of alpha' (1 - e^-h) as the weight of D1.

Orders rise in the first steps, as x0 becomes known, and fall in the last ones of fewer than 15 in all, as the paper
advises. A step from alpha = 0 or to sigma = 0 is infinite in lambda and is taken at order 1, where nothing is.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from dit_jax.samplers.course import Course, log_ratio, times_at
from dit_jax.samplers.loop import Denoiser
from dit_jax.samplers.multistep import Row, advance, nothing_yet, padded

Array = jax.Array

FEW_STEPS = 15


@dataclass(frozen=True)
class DPMSolverPP:
    """Order 2 or 3, or order 2 of the SDE."""

    order: int = 2
    draws: bool = False
    """The SDE's."""
    evaluations: int = 1

    def __post_init__(self) -> None:
        if self.order not in (2, 3) or (self.draws and self.order != 2):
            raise ValueError(f"order is {self.order}; expected 2 or 3, and 2 for the SDE")

    def last(self, course: Course, end: float) -> None:
        """It takes all steps."""

    def rows(self, course: Course, times: np.ndarray) -> Row:
        """Weights of x0, (S, order)."""
        p = course.levels(times)
        orders = usable_orders(log_ratio(p), self.order, falling=len(times) - 1 < FEW_STEPS)
        keep, noise, weights = [], [], []
        for i, order in enumerate(orders):
            shrink = p.sigma[i + 1] / p.sigma[i]
            decay = shrink * p.alpha[i] / p.alpha[i + 1]  # e^-h, 0 for an infinite step
            square = decay**2 if self.draws else decay
            keep.append(shrink * decay if self.draws else shrink)
            noise.append(p.sigma[i + 1] * np.sqrt(1 - square) if self.draws else 0.0)
            lam = log_ratio(p)[i + 1 - order : i + 2][::-1]
            weights.append(p.alpha[i + 1] * _weights(lam, square, order))
        return Row(times_at(course, times[:-1]), np.array(keep), padded(weights, self.order), np.array(noise))

    def begin(self, x: Array) -> tuple[Array, ...]:
        """Earlier x0, newest first."""
        return nothing_yet(x, self.order - 1)

    def step(
        self, denoiser: Denoiser, x: Array, carry: tuple[Array, ...], row: Row, noise: Array | None
    ) -> tuple[Array, tuple[Array, ...]]:
        """One evaluation, at the start of the step."""
        return advance(x, denoiser.x0(x, row.here), carry, row, noise if self.draws else None)


def _weights(lam: np.ndarray, decay: float, order: int) -> np.ndarray:
    """Weights of the latest x0 over alpha'; lam: the step's end, its start, and earlier ones, newest first."""
    newest = np.eye(order)
    if order == 1:
        return (1 - decay) * newest[0]
    h = lam[0] - lam[1]
    first = (newest[0] - newest[1]) * h / (lam[1] - lam[2])  # a difference, scaled to a step of h
    if order == 2:
        return (1 - decay) * (newest[0] + 0.5 * first)
    r0, r1 = (lam[1] - lam[2]) / h, (lam[2] - lam[3]) / h
    earlier = (newest[1] - newest[2]) / r1
    slope = first + r0 / (r0 + r1) * (first - earlier)
    curvature = (first - earlier) / (r0 + r1)
    gain = np.expm1(-h)
    return -gain * newest[0] + (gain / h + 1) * slope - ((gain + h) / h**2 - 0.5) * curvature


def usable_orders(lam: np.ndarray, order: int, falling: bool) -> list[int]:
    """The order of each of S steps between lambda (S + 1,): by how many finite ones lie behind it.

    falling: the last steps are of orders ..., 2, 1.
    """
    steps = len(lam) - 1
    orders = []
    for i in range(steps):
        most = min(order, i + 1, steps - i if falling else order)
        finite = 0
        while finite < most and np.isfinite(lam[i - finite]):
            finite += 1
        orders.append(max(finite, 1) if np.isfinite(lam[i + 1]) else 1)
    return orders
