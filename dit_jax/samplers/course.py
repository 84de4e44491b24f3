"""A process as a solver sees it: from noise to data, with levels of signal and noise at every time.

A solver knows no kind of process. It asks for the levels alpha and sigma at the times of its grid (NumPy float64),
for the network's x0, noise or slope there, and for two coordinates: the variable in which the ODE of this process
is smooth, for solvers of ODEs in general, and a clock, in which its SDE runs.

Times are in the process's own unit and direction. B batch; S times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, singledispatch
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import predictions
from dit_jax.diffusion.flow import DiffusionForm, FlowMatching, diffusion_coefficient
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.paths import point
from dit_jax.diffusion.predictions import Point, Prediction
from dit_jax.diffusion.process import DenoiseFn

Array = jax.Array


# sigma / alpha above which a step of an ODE in it is all but infinite: the linear schedule ends at 157, the cosine
# one at 20,000, where a slope's least change would be multiplied by as much.
STEEP = 200.0


class Times(NamedTuple):
    """Times as the network is asked at them, and the levels there: arrays (S,), or numbers inside a loop."""

    t: Any
    point: Point


class Course(Protocol):
    """One process on its way from noise to data."""

    @property
    def predicts(self) -> Prediction:
        """What the network's first channels are."""
        ...

    @property
    def start(self) -> float:
        """The time of pure noise."""
        ...

    @property
    def end(self) -> float:
        """The time of the result."""
        ...

    def levels(self, times: np.ndarray) -> Point:
        """alpha, sigma and their derivatives along the path at times (S,), float64."""
        ...

    def asked(self, times: np.ndarray) -> np.ndarray:
        """What `predict` is given at these times, (S,)."""
        ...

    def shown(self, times: np.ndarray) -> np.ndarray:
        """What the network is shown at these times, (S,)."""
        ...

    @property
    def last_asked(self) -> float:
        """The last time at which the network can be asked."""
        ...

    def answers(self, time: float) -> bool:
        """Whether the network can be asked at this time."""
        ...

    def predict(self, denoise_fn: DenoiseFn, x: Array, asked: Array) -> Array:
        """The network's prediction (B, H, W, C) float32; asked: (B,)."""
        ...

    def coordinates(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(c, u), each (S,), such that d(x / c) / du = slope along the probability-flow ODE."""
        ...

    def smooth(self, times: np.ndarray) -> np.ndarray:
        """Whether a slope at these times, (S,), may stand for those around it in u; where not, order 1 is left."""
        ...

    def slope(self, prediction: Array, x: Array, p: Point) -> Array:
        """What `coordinates` says."""
        ...

    def clock(self, times: np.ndarray) -> np.ndarray:
        """What the clock shows at these times, (S,)."""
        ...

    def diffusion(self, times: np.ndarray, form: DiffusionForm, norm: float) -> np.ndarray:
        """w of the SDE dx = (v + w score) dc + sqrt(2 w) dW at these times, (S,).

        ValueError for a form that is infinite there, or not of this process.
        """
        ...

    def velocity(self, prediction: Array, x: Array, p: Point) -> Array:
        """dx / dc along the ODE, c the clock."""
        ...

    def at_clock(self, value: Array) -> Times:
        """Time and levels, float32, when the clock shows this, known only while the loop runs."""
        ...


@dataclass(frozen=True)
class GaussianCourse:
    """A discrete process. Times are its steps T - 1 .. 0, and -1 for the data (alpha 1, sigma 0).

    Between two steps log(alpha / sigma), and what the network is shown, are interpolated, as in DPM-Solver (arXiv
    2206.00927, appendix D). The ODE is d(x / alpha) / d(sigma / alpha) = noise; the clock is log(alpha / sigma).
    """

    process: GaussianDiffusion

    @property
    def predicts(self) -> Prediction:
        return self.process.predicts

    @property
    def start(self) -> float:
        return self.process.num_timesteps - 1.0

    @property
    def end(self) -> float:
        return -1.0

    @cached_property
    def _log_ratios(self) -> np.ndarray:
        ac = self.process.alphas_cumprod
        return 0.5 * (np.log(ac) - np.log1p(-ac))

    def _log_ratio(self, times: np.ndarray) -> np.ndarray:
        known = np.interp(times, np.arange(len(self._log_ratios)), self._log_ratios)
        return np.where(times < 0, np.inf, known)

    def levels(self, times: np.ndarray) -> Point:
        ratio = self._log_ratio(times)
        alpha, sigma = (np.exp(-0.5 * np.logaddexp(0, sign * 2 * ratio)) for sign in (-1, 1))
        return Point(alpha, sigma, -sigma, alpha)

    def asked(self, times: np.ndarray) -> np.ndarray:
        kept = self.process.timestep_map
        shown = np.interp(times, np.arange(len(kept)), kept)
        whole = np.rint(shown).astype(np.int32)
        return whole if np.array_equal(whole, shown) else shown  # a network may count on whole timesteps

    def shown(self, times: np.ndarray) -> np.ndarray:
        return self.asked(times)

    @property
    def last_asked(self) -> float:
        return 0.0

    def answers(self, time: float) -> bool:
        return time >= 0

    def predict(self, denoise_fn: DenoiseFn, x: Array, asked: Array) -> Array:
        return self.process.prediction_of(denoise_fn(x, asked), x)

    def coordinates(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.levels(times).alpha, np.exp(-self._log_ratio(times))

    def smooth(self, times: np.ndarray) -> np.ndarray:
        return self._log_ratio(times) > -math.log(STEEP)

    def slope(self, prediction: Array, x: Array, p: Point) -> Array:
        return predictions.to_noise(self.predicts, prediction, x, p)

    def clock(self, times: np.ndarray) -> np.ndarray:
        return self._log_ratio(times)

    def diffusion(self, times: np.ndarray, form: DiffusionForm, norm: float) -> np.ndarray:
        if form != "sbdm":
            raise ValueError(f"diffusion_form is {form!r}; expected sbdm, a Gaussian process has no other")
        return norm * self.levels(times).sigma ** 2

    def velocity(self, prediction: Array, x: Array, p: Point) -> Array:
        return p.sigma * (p.sigma * x - predictions.to_noise(self.predicts, prediction, x, p))

    def at_clock(self, value: Array) -> Times:
        falling = jnp.asarray(self._log_ratios[::-1], jnp.float32)
        kept = jnp.asarray(self.process.timestep_map[::-1], jnp.float32)
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(2 * value)), jnp.sqrt(jax.nn.sigmoid(-2 * value))
        return Times(jnp.interp(value, falling, kept), Point(alpha, sigma, -sigma, alpha))


@dataclass(frozen=True)
class FlowCourse:
    """A process in continuous time, from 0 (noise) to 1 (data) or to the margins that its formulas need.

    The ODE is dx / dt = velocity; the clock is t.
    """

    process: FlowMatching

    @property
    def predicts(self) -> Prediction:
        return self.process.prediction

    @property
    def start(self) -> float:
        return self.process.sampling_interval()[0]

    @property
    def end(self) -> float:
        return self.process.sampling_interval()[1]

    def levels(self, times: np.ndarray) -> Point:
        return point(self.process.path, times)

    def asked(self, times: np.ndarray) -> np.ndarray:
        return times

    def shown(self, times: np.ndarray) -> np.ndarray:
        t: Any = times.astype(np.float32)  # of NumPy also where the loop is traced
        return np.asarray(self.process.shown_time(t))

    @property
    def last_asked(self) -> float:
        return self.end

    def answers(self, time: float) -> bool:
        return True

    def predict(self, denoise_fn: DenoiseFn, x: Array, asked: Array) -> Array:
        return self.process.predict(denoise_fn, x, asked)

    def coordinates(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.ones_like(times), times

    def smooth(self, times: np.ndarray) -> np.ndarray:
        return np.ones(times.shape, bool)

    def slope(self, prediction: Array, x: Array, p: Point) -> Array:
        return self.process.velocity(prediction, x, p)

    def clock(self, times: np.ndarray) -> np.ndarray:
        return times

    def diffusion(self, times: np.ndarray, form: DiffusionForm, norm: float) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            w = diffusion_coefficient(form, times, self.levels(times), norm, np)
        if not np.isfinite(w).all():
            raise ValueError(
                f"diffusion_form {form!r} is infinite at t = {times[~np.isfinite(w)][0]:g} of path "
                f"{self.process.path!r}; expected a sample_eps above 0, or another form"
            )
        return w

    def velocity(self, prediction: Array, x: Array, p: Point) -> Array:
        return self.process.velocity(prediction, x, p)

    def at_clock(self, value: Array) -> Times:
        return Times(value, point(self.process.path, value))


@singledispatch
def course_of(process: Any) -> Course:
    """The course of a process; TypeError for a kind that has none."""
    raise TypeError(f"the process is a {type(process).__name__}, for which no sampler is known")


course_of.register(GaussianDiffusion, GaussianCourse)
course_of.register(FlowMatching, FlowCourse)


def log_ratio(p: Point) -> np.ndarray:
    """lambda = log(alpha / sigma), which grows from noise to data; infinite where one of them is 0."""
    with np.errstate(divide="ignore"):
        return np.log(p.alpha) - np.log(p.sigma)


def times_at(course: Course, times: np.ndarray) -> Times:
    """The table of a loop that asks the network at these times (S,)."""
    return Times(course.asked(times), course.levels(times))


def time_of_log_ratio(course: Course, wanted: np.ndarray) -> np.ndarray:
    """The times (S,) at which log(alpha / sigma) has these values, by halving the way (it grows along it)."""
    early = np.full(wanted.shape, course.start)
    late = np.full(wanted.shape, course.last_asked)
    for _ in range(math.ceil(math.log2(1e16))):
        middle = (early + late) / 2
        before = log_ratio(course.levels(middle)) < wanted
        early, late = np.where(before, middle, early), np.where(before, late, middle)
    return (early + late) / 2
