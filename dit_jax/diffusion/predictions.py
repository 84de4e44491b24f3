"""What a network may predict of x = alpha x0 + sigma eps, and the conversions between the four.

x0 the clean latent, eps the noise, score the gradient of log p(x), -eps / sigma, and v = alpha' x0 + sigma' eps, the
velocity along the path; a prime is the derivative by time (Ma et al., arXiv 2401.08740, section 2). The v of Salimans
& Ho (arXiv 2202.00512) is the velocity of a circle: alpha' = -sigma, sigma' = alpha.

Each function divides by no more than it must: noise and score from x0 need sigma > 0, x0 and velocity from the noise
need alpha > 0, and a predicted velocity gives everything wherever alpha sigma' differs from sigma alpha'.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

Prediction = Literal["velocity", "score", "noise", "x0"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


class Point(NamedTuple):
    """Levels of signal and noise at a time, and their derivatives by it; numbers, or arrays that broadcast to x."""

    alpha: Any
    sigma: Any
    d_alpha: Any
    d_sigma: Any

    @property
    def determinant(self) -> Any:
        """alpha sigma' - sigma alpha', by which x0 and eps follow from x and v."""
        return self.alpha * self.d_sigma - self.sigma * self.d_alpha


def target(kind: Prediction, x0: Any, eps: Any, p: Point) -> Any:
    """The prediction of this kind that is right for x = alpha x0 + sigma eps."""
    if kind == "x0":
        return x0
    if kind == "noise":
        return eps
    if kind == "score":
        return -eps / p.sigma
    return p.d_alpha * x0 + p.d_sigma * eps


def to_noise(kind: Prediction, output: Any, x: Any, p: Point) -> Any:
    """eps from a prediction of this kind at x."""
    if kind == "noise":
        return output
    if kind == "score":
        return -p.sigma * output
    if kind == "x0":
        return (x - p.alpha * output) / p.sigma
    return (p.alpha * output - p.d_alpha * x) / p.determinant


def to_x0(kind: Prediction, output: Any, x: Any, p: Point) -> Any:
    """x0 from a prediction of this kind at x."""
    if kind == "x0":
        return output
    if kind == "velocity":
        return (p.d_sigma * x - p.sigma * output) / p.determinant
    return (x - p.sigma * to_noise(kind, output, x, p)) / p.alpha


def to_velocity(kind: Prediction, output: Any, x: Any, p: Point) -> Any:
    """v from a prediction of this kind at x."""
    if kind == "velocity":
        return output
    if kind == "x0":
        return (p.d_sigma * x - p.determinant * output) / p.sigma
    return (p.d_alpha * x + p.determinant * to_noise(kind, output, x, p)) / p.alpha


def to_score(kind: Prediction, output: Any, x: Any, p: Point) -> Any:
    """The score from a prediction of this kind at x."""
    return output if kind == "score" else -to_noise(kind, output, x, p) / p.sigma
