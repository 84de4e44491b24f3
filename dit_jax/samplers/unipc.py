"""UniPC: a predictor and a corrector of one form, one evaluation a step (Zhao et al., arXiv 2302.04867).

The multistep variant that predicts x0, in lambda = log(alpha / sigma). The x0 that the network gives at the
predicted x of a step first corrects that x, then serves the next prediction. B(h) is h (bh1) or e^h - 1 (bh2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from dit_jax.samplers.course import Course, log_ratio, times_at
from dit_jax.samplers.dpm import usable_orders
from dit_jax.samplers.loop import Denoiser
from dit_jax.samplers.multistep import Row, advance, nothing_yet, padded, weighted

Array = jax.Array
Variant = Literal["bh1", "bh2"]


class Correction(NamedTuple):
    """The corrected x: own x + before x_before + sum(weights * x0), the newest x0 being that of x."""

    own: Any
    before: Any
    weights: Any


@dataclass(frozen=True)
class UniPC:
    """UniPC-p: order p, with the corrector p + 1; orders rise in the first steps and fall in the last."""

    order: int = 2
    variant: Variant = "bh2"
    evaluations: int = 1
    draws: bool = False

    def __post_init__(self) -> None:
        if self.order not in (2, 3) or self.variant not in ("bh1", "bh2"):
            raise ValueError(
                f"order is {self.order} and variant {self.variant!r}; expected 2 or 3, bh1 or bh2"
            )

    def last(self, course: Course, end: float) -> None:
        """It takes all steps."""

    def rows(self, course: Course, times: np.ndarray) -> tuple[Correction, Row]:
        """Weights of x0: (S, order + 1) to correct, (S, order) to predict."""
        p = course.levels(times)
        lam = log_ratio(p)
        orders = usable_orders(lam, self.order, falling=True)
        shrink = p.sigma[1:] / p.sigma[:-1]
        own, before = np.ones(len(orders)), np.zeros(len(orders))
        correct, predict = [np.zeros(1)], []
        for i, order in enumerate(orders):
            latest = lam[i + 1 - order : i + 2][::-1]
            predict.append(p.alpha[i + 1] * _predictor(latest, self.variant))
            if i + 1 < len(orders):
                correctable = bool(np.isfinite(latest).all())
                correct.append(
                    p.alpha[i + 1] * _corrector(latest, self.variant) if correctable else np.zeros(1)
                )
                if correctable:
                    own[i + 1], before[i + 1] = 0.0, shrink[i]
        row = Row(times_at(course, times[:-1]), shrink, padded(predict, self.order), np.zeros(len(orders)))
        return Correction(own, before, padded(correct, self.order + 1)), row

    def begin(self, x: Array) -> tuple[Array, tuple[Array, ...]]:
        """The corrected x one step before, and earlier x0, newest first."""
        return x, nothing_yet(x, self.order)

    def step(
        self, denoiser: Denoiser, x: Array, carry: Any, row: tuple[Correction, Row], noise: Array | None
    ) -> tuple[Array, tuple[Array, tuple[Array, ...]]]:
        """Correct x by its own x0, then predict the next."""
        (before, earlier), (correction, prediction) = carry, row
        x0 = denoiser.x0(x, prediction.here)
        x = correction.own * x + correction.before * before + weighted(correction.weights, (x0, *earlier))
        moved, _ = advance(x, x0, earlier[: self.order - 1], prediction, None)
        return moved, (x, (x0, *earlier)[: self.order])


def _predictor(lam: np.ndarray, variant: Variant) -> np.ndarray:
    """Weights over alpha' of the latest x0, newest first; lam: the step's end, its start, and earlier ones."""
    order = len(lam) - 1
    weights = np.zeros(order)
    gain = -np.expm1(-(lam[0] - lam[1]))
    weights[0] = gain
    if order > 1:
        h = lam[0] - lam[1]
        positions = (lam[2:] - lam[1]) / h
        system, values, scale = _conditions(positions, h, variant)
        # With one difference the paper takes 1/2, which is right to this order and does not depend on h.
        rhos = np.array([0.5]) if order == 2 else np.linalg.solve(system, values)
        shares = scale * rhos / positions
        weights[1:] += shares
        weights[0] -= shares.sum()
    return weights


def _corrector(lam: np.ndarray, variant: Variant) -> np.ndarray:
    """Weights over alpha' of the x0 at the step's end, its start, and earlier ones."""
    h = lam[0] - lam[1]
    positions = np.append((lam[2:] - lam[1]) / h, 1.0)
    system, values, scale = _conditions(positions, h, variant)
    rhos = np.array([0.5]) if len(positions) == 1 else np.linalg.solve(system, values)
    shares = scale * rhos / positions
    return np.concatenate([shares[-1:], [-np.expm1(-h) - shares.sum()], shares[:-1]])


def _conditions(positions: np.ndarray, h: float, variant: Variant) -> tuple[np.ndarray, np.ndarray, float]:
    """(R, b, -B) of the paper's order conditions R rho = b for x0 at these positions, in units of h (eq. 4 and 7)."""
    hh = -h
    scale = hh if variant == "bh1" else math.expm1(hh)
    count = len(positions)
    phi, factorial, values = math.expm1(hh) / hh - 1, 1, []
    for k in range(1, count + 1):
        values.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    return positions ** np.arange(count)[:, None], np.array(values), -scale
