"""What a solver is, and the one loop that all run in: the whole way from noise to data as one lax.scan.

A new solver is one file: a frozen dataclass that satisfies `Solver`, and a row in `table`.

B batch, H height, W width, C channels of the latent, S steps, i.e. S + 1 times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import predictions
from dit_jax.diffusion.guidance import Guided
from dit_jax.diffusion.predictions import Point
from dit_jax.diffusion.process import DenoiseFn
from dit_jax.samplers.course import Course, Times
from dit_jax.samplers.noise import keys_for, step_noise_at

Array = jax.Array


@dataclass(frozen=True)
class Denoiser:
    """The network on a course: one evaluation per call of a method."""

    course: Course
    denoise_fn: DenoiseFn

    def prediction(self, x: Array, at: Times) -> Array:
        """Whatever the network predicts, (B, H, W, C) float32."""
        return self.course.predict(self.denoise_fn, x, jnp.broadcast_to(at.t, x.shape[:1]))

    def x0(self, x: Array, at: Times) -> Array:
        """The clean latent."""
        return predictions.to_x0(self.course.predicts, self.prediction(x, at), x, at.point)

    def slope(self, x: Array, at: Times) -> Array:
        """The slope of the ODE in the course's coordinates."""
        return self.course.slope(self.prediction(x, at), x, at.point)


Paste = Callable[[Array, Point], Array]


class Solver(Protocol):
    """A rule that leads from one time to the next. Whatever depends on the times alone is a table made before."""

    @property
    def evaluations(self) -> int:
        """Evaluations of the network in a step."""
        ...

    @property
    def draws(self) -> bool:
        """Whether a step needs noise."""
        ...

    def last(self, course: Course, end: float) -> Solver | None:
        """What takes the last step, to this time, where this solver cannot."""
        ...

    def rows(self, course: Course, times: np.ndarray) -> Any:
        """A tree of arrays (S, ...), float64 or integers: what each step is given of times (S + 1,).

        Raises ValueError where the mathematics does not allow these times or this process.
        """
        ...

    def begin(self, x: Array) -> Any:
        """What is carried between steps beside x, before the first."""
        ...

    def step(
        self, denoiser: Denoiser, x: Array, carry: Any, row: Any, noise: Array | None
    ) -> tuple[Array, Any]:
        """(x, carry) one step on; a pure function. noise: standard normal, of x's shape, where `draws`."""
        ...


class Drawn(NamedTuple):
    """What a loop gives."""

    x: Array
    """Latents (B, H, W, C) at the last time."""
    states: Array | None
    """After every step, (S, B, H, W, C), where they were asked for."""
    evaluations: int | Array
    """How often the network ran; a number known before, but for an adaptive solver."""


def draw(
    course: Course,
    solver: Solver,
    denoise_fn: DenoiseFn,
    noise: Array,
    key: Array | None = None,
    *,
    times: np.ndarray,
    step_noise: Array | None = None,
    keep_states: bool = False,
    paste: Paste | None = None,
) -> Drawn:
    """From `noise` (B, H, W, C) through all times (S + 1,) by one solver.

    key: one key, folded with 0..B-1, or one per sample (see `sample_keys`), typed or raw.
    step_noise: (S, B, H, W, C), replaces the drawn noise, in order of use; no key is needed then. S without the last
    step where that is another solver's. Neither is used by a solver that draws no noise.

    paste: what becomes of a state (B, H, W, C) after every step, by the levels there (numbers).

    Raises ValueError when shapes do not fit, the noise has no source, or the solver refuses the times.
    """
    apart = solver.last(course, times[-1])
    steps, batch = len(times) - (2 if apart else 1), noise.shape[0]
    if step_noise is not None and step_noise.shape != (steps, *noise.shape):
        raise ValueError(f"step_noise has shape {step_noise.shape}; expected {(steps, *noise.shape)}")
    if solver.draws and step_noise is None and key is None:
        raise ValueError(
            "key and step_noise are missing; expected one of them, the sampler needs noise at every step"
        )
    keys = keys_for(key, batch) if solver.draws and step_noise is None and key is not None else None

    x, kept = jnp.asarray(noise, jnp.float32), list[Array]()
    if steps:
        rows, carry = cast(solver.rows(course, times[: steps + 1])), solver.begin(x)
        there = cast(course.levels(times[1 : steps + 1])) if paste else None
        inputs = (rows, jnp.arange(steps, dtype=jnp.int32), step_noise if solver.draws else None, there)
        for first, end, network in segments(course, solver, denoise_fn, times[: steps + 1]):
            part = jax.tree.map(lambda table, of=slice(first, end): table[of], inputs)
            body = _body(solver, Denoiser(course, network), keys, keep_states, paste)
            (x, carry), states = jax.lax.scan(body, (x, carry), part)
            kept += [] if states is None else [states]
    if apart:
        row = jax.tree.map(lambda table: table[0], cast(apart.rows(course, times[-2:])))
        ((_, _, network),) = segments(course, apart, denoise_fn, times[-2:])
        x, _ = apart.step(Denoiser(course, network), x, apart.begin(x), row, None)
        if paste:
            x = paste(x, jax.tree.map(lambda table: table[0], cast(course.levels(times[-1:]))))
        kept += [x[None]] if keep_states else []
    return Drawn(x, jnp.concatenate(kept) if kept else None, evaluations_of(course, solver, times))


def _body(
    solver: Solver, denoiser: Denoiser, keys: Array | None, keep_states: bool, paste: Paste | None
) -> Callable[[Any, Any], tuple[Any, Array | None]]:
    """One step as lax.scan takes it: (x, carry), (row, number of the step, noise, levels at its end)."""

    def body(state: tuple[Array, Any], inputs: Any) -> tuple[Any, Array | None]:
        row, s, eps, there = inputs
        if keys is not None:
            eps = step_noise_at(keys, s, state[0].shape[1:])
        x, carry = solver.step(denoiser, *state, row, eps)
        x = x if paste is None else paste(x, there)
        return (x, carry), x if keep_states else None

    return body


def segments(
    course: Course, solver: Solver, denoise_fn: DenoiseFn, times: np.ndarray
) -> list[tuple[int, int, DenoiseFn]]:
    """(first step, step after the last, network) of the parts of a way through times (S + 1,).

    In a part where guidance holds nowhere, the network is asked without it, which costs half.
    """
    steps = len(times) - 1
    if not isinstance(denoise_fn, Guided):
        return [(0, steps, denoise_fn)]
    holds = denoise_fn.holds(course.shown(times))
    # A step asks at its start; one of several evaluations, at its end as well.
    guided = holds[:-1] | (holds[1:] & (solver.evaluations > 1))
    ends = [*(np.flatnonzero(np.diff(guided)) + 1), steps]
    parts = list[tuple[int, int, DenoiseFn]]()
    for first, end in zip([0, *map(int, ends)], map(int, ends), strict=False):
        if guided[first]:
            parts.append((first, end, denoise_fn))
        else:
            within = segments(course, solver, denoise_fn.unguided, times[first : end + 1])
            parts += [(first + a, first + b, network) for a, b, network in within]
    return parts


def evaluations_of(course: Course, solver: Solver, times: np.ndarray) -> int:
    """How often the network runs on the way through these times (S + 1,)."""
    apart = solver.last(course, times[-1])
    steps = len(times) - 1
    return (steps - 1) * solver.evaluations + apart.evaluations if apart else steps * solver.evaluations


def cast(rows: Any) -> Any:
    """Tables as the loop uses them: float64 becomes float32, integers stay."""

    def one(table: np.ndarray) -> Array:
        whole = np.issubdtype(table.dtype, np.integer)
        return jnp.asarray(table, jnp.int32 if whole else jnp.float32)

    return jax.tree.map(one, rows)
