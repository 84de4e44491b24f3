"""Reverse SDEs from noise to data by Euler-Maruyama, whose diffusion the sampler may choose (SiT, section 2.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import predictions
from dit_jax.diffusion.flow import DiffusionForm, FlowMatching
from dit_jax.diffusion.process import DenoiseFn
from dit_jax.samplers.course import Course, FlowCourse, Times, times_at
from dit_jax.samplers.loop import Denoiser, draw
from dit_jax.samplers.ode import check_points

Array = jax.Array
LastStep = Literal["mean", "euler", "tweedie", "none"]
LAST_STEP_SIZE = 0.04


class Row(NamedTuple):
    """A step: its width on the clock and the diffusion w at its start."""

    here: Times
    width: Any
    w: Any


@dataclass(frozen=True)
class EulerMaruyama:
    """dx = (v + w score) dc + sqrt(2 w) dW, w of a form times a norm; c is the course's clock."""

    form: DiffusionForm = "sigma"
    norm: float = 1.0
    last_step: LastStep = "mean"
    evaluations: int = 1
    draws: bool = True

    def last(self, course: Course, end: float) -> Final | None:
        """A step without noise; none for "none"."""
        return None if self.last_step == "none" else Final(self)

    def rows(self, course: Course, times: np.ndarray) -> Row:
        """Widths and w of each step; w must be finite at its end as well."""
        w = course.diffusion(times, self.form, self.norm)
        return Row(times_at(course, times[:-1]), np.diff(course.clock(times)), w[:-1])

    def begin(self, x: Array) -> None:
        """Nothing is carried."""

    def step(
        self, denoiser: Denoiser, x: Array, carry: None, row: Row, noise: Array | None
    ) -> tuple[Array, None]:
        """One evaluation, at the start of the step."""
        assert noise is not None
        prediction = denoiser.prediction(x, row.here)
        drift = _drift(denoiser.course, prediction, x, row)
        return x + row.width * drift + jnp.sqrt(2 * row.w * row.width) * noise, None


@dataclass(frozen=True)
class Final:
    """The last step of Euler-Maruyama, along the SDE's drift, the ODE's, or to the posterior's mean."""

    main: EulerMaruyama
    evaluations: int = 1
    draws: bool = False

    def last(self, course: Course, end: float) -> None:
        """It is the last."""

    def rows(self, course: Course, times: np.ndarray) -> Row:
        """The one step; its width is not used for the posterior's mean, and may be infinite."""
        width = np.zeros(1) if self.main.last_step == "tweedie" else np.diff(course.clock(times))
        return Row(
            times_at(course, times[:-1]), width, course.diffusion(times[:-1], self.main.form, self.main.norm)
        )

    def begin(self, x: Array) -> None:
        """Nothing is carried."""

    def step(
        self, denoiser: Denoiser, x: Array, carry: None, row: Row, noise: Array | None
    ) -> tuple[Array, None]:
        """One evaluation."""
        course, p = denoiser.course, row.here.point
        prediction = denoiser.prediction(x, row.here)
        if self.main.last_step == "tweedie":
            return predictions.to_x0(course.predicts, prediction, x, p), None
        if self.main.last_step == "mean":
            return x + row.width * _drift(course, prediction, x, row), None
        return x + row.width * course.velocity(prediction, x, p), None


def _drift(course: Course, prediction: Array, x: Array, row: Row) -> Array:
    score = predictions.to_score(course.predicts, prediction, x, row.here.point)
    return course.velocity(prediction, x, row.here.point) + row.w * score


def sample_sde(
    process: FlowMatching,
    denoise_fn: DenoiseFn,
    noise: Array,
    key: Array | None = None,
    *,
    steps: int = 250,
    diffusion_form: DiffusionForm = "sigma",
    diffusion_norm: float = 1.0,
    last_step: LastStep = "mean",
    last_step_size: float = LAST_STEP_SIZE,
    step_noise: Array | None = None,
    return_trajectory: bool = False,
) -> Array:
    """Clean latents (B, H, W, C) from `noise`; one evaluation a step.

    denoise_fn(x, shown time (B,)): the network. key: one key, or one per sample. steps: points in time, as in SiT:
    250 are 249 steps to 1 - last_step_size, and the last step. diffusion_form: the w of dx = (v + w score) dt +
    sqrt(2 w) dW, times diffusion_norm. last_step: a step without noise along the SDE's drift (mean) or the ODE's
    (euler), the posterior mean (tweedie), or none, which ends at the process's margin. step_noise: (at least steps
    - 1, B, H, W, C), replaces what the key draws. return_trajectory: the state after every step, the last included.

    Raises ValueError for unknown names, fewer than 2 points, no source of noise, or a diffusion that is infinite.
    """
    if last_step not in ("mean", "euler", "tweedie", "none"):
        raise ValueError(f"last_step is {last_step!r}; expected mean, euler, tweedie or none")
    times = sde_times(process, check_points(steps), diffusion_form, last_step_size, last_step)
    if step_noise is not None:
        if len(step_noise) < steps - 1 or step_noise.shape[1:] != noise.shape:
            raise ValueError(
                f"step_noise has shape {step_noise.shape}; expected {(steps - 1, *noise.shape)} or more steps"
            )
        step_noise = jnp.asarray(step_noise[: steps - 1], jnp.float32)
    drawn = draw(
        FlowCourse(process), EulerMaruyama(diffusion_form, diffusion_norm, last_step), denoise_fn, noise, key,
        times=times, step_noise=step_noise, keep_states=return_trajectory,
    )  # fmt: skip
    return drawn.x if drawn.states is None else drawn.states


def sde_times(
    process: FlowMatching,
    points: int,
    form: DiffusionForm = "sigma",
    last_step_size: float = LAST_STEP_SIZE,
    last_step: LastStep = "mean",
) -> np.ndarray:
    """SiT's times: `points` evenly to 1 - last_step_size, and 1 (or to the process's margin, without a last step)."""
    if last_step == "none":
        return np.linspace(*process.sampling_interval(form), points)
    return np.append(np.linspace(*process.sampling_interval(form, last_step_size), points), 1.0)
