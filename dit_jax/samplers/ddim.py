"""DDIM (Song et al., arXiv 2010.02502): the predicted x0 and noise, mixed at the levels of the next time.

Without noise it is Euler's method on a Gaussian process and on a linear path; with eta 1 it is the ancestral sampler
of the posterior's variance. Levels need not preserve the variance: with s the standard deviation of what is added,

    x' = alpha' x0 + sqrt(sigma'^2 - s^2) noise + s z
    s  = eta (sigma' / sigma) sqrt(sigma^2 - (alpha / alpha')^2 sigma'^2)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import predictions
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.predictions import Point
from dit_jax.diffusion.process import DenoiseFn
from dit_jax.samplers.ancestral import every_step
from dit_jax.samplers.course import Course, GaussianCourse, Times, times_at
from dit_jax.samplers.loop import Denoiser, draw

Array = jax.Array


class Row(NamedTuple):
    """A step: weights of x0, of the predicted noise and of the drawn noise."""

    here: Times
    signal: Any
    direction: Any
    spread: Any


@dataclass(frozen=True)
class Ddim:
    """eta: 0 is deterministic, 1 has the variance of DDPM with fixed_small."""

    eta: float = 0.0
    clip_denoised: bool = False
    evaluations: int = 1

    @property
    def draws(self) -> bool:
        """With eta alone."""
        return self.eta != 0

    def last(self, course: Course, end: float) -> None:
        """It takes all steps."""

    def rows(self, course: Course, times: np.ndarray) -> Row:
        """Levels of each step."""
        p = course.levels(times)
        before, after = Point(*(v[:-1] for v in p)), Point(*(v[1:] for v in p))
        spread, direction = _weights(before, after, self.eta)
        return Row(times_at(course, times[:-1]), after.alpha, direction, spread)

    def begin(self, x: Array) -> None:
        """Nothing is carried."""

    def step(
        self, denoiser: Denoiser, x: Array, carry: None, row: Row, noise: Array | None
    ) -> tuple[Array, None]:
        """One evaluation."""
        kind, p = denoiser.course.predicts, row.here.point
        prediction = denoiser.prediction(x, row.here)
        x0 = predictions.to_x0(kind, prediction, x, p)
        if self.clip_denoised:
            x0 = jnp.clip(x0, -1.0, 1.0)
            prediction, kind = x0, "x0"
        moved = row.signal * x0 + row.direction * predictions.to_noise(kind, prediction, x, p)
        return moved if noise is None or not self.draws else moved + row.spread * noise, None


def ddim_step(
    diffusion: GaussianDiffusion,
    model_output: Array,
    x_t: Array,
    t: Array,
    noise: Array | None = None,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> Array:
    """x_{t-1} by one DDIM step (eq. 12 and 16); noise is unused when eta is 0. t: steps of the process, (B,)."""
    sigma, direction = ddim_tables(diffusion, eta)
    p = diffusion.p_mean_variance(model_output, x_t, t, clip_denoised)
    eps = diffusion.predict_eps(p.pred_xstart, x_t, t)
    signal = diffusion.at(np.sqrt(diffusion.alphas_cumprod_prev), t, x_t)
    mean = signal * p.pred_xstart + diffusion.at(direction, t, x_t) * eps
    if eta == 0:
        return mean
    if noise is None:
        raise ValueError(f"noise is missing; expected an array of shape {x_t.shape} when eta is {eta}")
    return mean + diffusion.at(sigma, t, x_t) * noise


def ddim_tables(diffusion: GaussianDiffusion, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation of the noise and weight of the predicted noise at each step, (T,) float64.

    Raises ValueError for an eta below 0, or with which a step would add more noise than it leaves.
    """
    ac, prev = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    before, after = (Point(np.sqrt(a), np.sqrt(1 - a), None, None) for a in (ac, prev))
    return _weights(before, after, eta)


def _weights(before: Point, after: Point, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights of drawn and of predicted noise."""
    lost = before.sigma**2 - (before.alpha / after.alpha * after.sigma) ** 2
    spread = eta * after.sigma / before.sigma * np.sqrt(np.maximum(lost, 0))
    left = after.sigma**2 - spread**2
    if not (eta >= 0 and left.min() >= -1e-12):
        raise ValueError(
            f"eta is {eta}; expected 0 or more, and no step to add more noise than it leaves (1 always fits)"
        )
    return spread, np.sqrt(np.maximum(left, 0))


def sample_ddim(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    noise: Array,
    key: Array | None = None,
    step_noise: Array | None = None,
    return_trajectory: bool = False,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> Array:
    """x0 (B, H, W, C) by DDIM; the arguments of `sample_ddpm`, and `eta`, a number known at trace time.

    With eta = 0 (the default) no noise is drawn and neither key nor step_noise is used.
    """
    drawn = draw(
        GaussianCourse(diffusion), Ddim(eta, clip_denoised), denoise_fn, noise, key,
        times=every_step(diffusion), step_noise=step_noise, keep_states=return_trajectory,
    )  # fmt: skip
    return drawn.x if drawn.states is None else drawn.states
