"""Every sampler by its name: which processes it serves, what a step costs, whether it draws noise.

A sampler is a solver on a grid of times. A new one is a row here.

B batch, H height, W width, C channels of the latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from dit_jax.diffusion.process import DenoiseFn
from dit_jax.samplers.adams import AdamsBashforth
from dit_jax.samplers.adaptive import sample_dopri5
from dit_jax.samplers.ancestral import Ancestral, every_step, thinned
from dit_jax.samplers.course import Course, FlowCourse, GaussianCourse, course_of
from dit_jax.samplers.ddim import Ddim
from dit_jax.samplers.dpm import DPMSolverPP
from dit_jax.samplers.grid import GridName, check_times, make_times
from dit_jax.samplers.heun import Heun
from dit_jax.samplers.loop import Drawn, Solver, draw, evaluations_of
from dit_jax.samplers.sde import EulerMaruyama, sde_times
from dit_jax.samplers.unipc import UniPC

Array = jax.Array
Kind = Literal["gaussian", "flow"]


@dataclass(frozen=True)
class Choice:
    """How to sample: a name of the table, how many steps, and what some samplers take besides."""

    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    """Noise of DDIM: 0 deterministic, 1 as much as DDPM."""
    grid: GridName | tuple[float, ...] | None = None
    """Times from noise to data: a named grid, the times themselves (then steps is not used), or the sampler's own."""
    grid_shift: float = 3.0
    """Of the grid "shifted"."""


@dataclass(frozen=True)
class Sampler:
    """A row of the table."""

    about: str
    solver: Callable[[Kind, Choice], Solver] | None
    """None: adaptive, its steps are its own."""
    serves: tuple[Kind, ...] = ("gaussian", "flow")
    evaluations: int | None = 1
    """Of the network in a step; None where they are known afterwards."""
    draws: bool = False
    """Whether it draws noise beyond its start (DDIM does with an eta above 0)."""


def _euler_maruyama(kind: Kind, choice: Choice) -> Solver:
    return EulerMaruyama() if kind == "flow" else EulerMaruyama("sbdm", last_step="tweedie")


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(
        "ancestral, by the process's variance", lambda k, c: Ancestral(), ("gaussian",), draws=True
    ),
    "ddim": Sampler("DDIM", lambda k, c: Ddim(c.eta)),
    "euler": Sampler("Euler on the ODE", lambda k, c: AdamsBashforth(1)),
    "heun": Sampler("Heun on the ODE", lambda k, c: Heun(), evaluations=2),
    "ab2": Sampler("Adams-Bashforth of order 2", lambda k, c: AdamsBashforth(2)),
    "ab3": Sampler("Adams-Bashforth of order 3", lambda k, c: AdamsBashforth(3)),
    "ab4": Sampler("Adams-Bashforth of order 4", lambda k, c: AdamsBashforth(4)),
    "dpmpp_2m": Sampler("DPM-Solver++ of order 2", lambda k, c: DPMSolverPP(2)),
    "dpmpp_3m": Sampler("DPM-Solver++ of order 3", lambda k, c: DPMSolverPP(3)),
    "dpmpp_2m_sde": Sampler("DPM-Solver++ of the SDE", lambda k, c: DPMSolverPP(2, draws=True), draws=True),
    "unipc_2": Sampler("UniPC-2, bh2", lambda k, c: UniPC(2)),
    "unipc_3": Sampler("UniPC-3, bh2", lambda k, c: UniPC(3)),
    "unipc_2_bh1": Sampler("UniPC-2, bh1", lambda k, c: UniPC(2, "bh1")),
    "unipc_3_bh1": Sampler("UniPC-3, bh1", lambda k, c: UniPC(3, "bh1")),
    "euler_maruyama": Sampler("Euler-Maruyama on the SDE", _euler_maruyama, draws=True),
    "dopri5": Sampler("adaptive Dormand-Prince, steps of its own", None, evaluations=None),
}


class Plan(NamedTuple):
    """What a choice comes to on a process."""

    course: Course
    solver: Solver | None
    times: np.ndarray | None

    @property
    def evaluations(self) -> int | None:
        """Of the network in all; None where they are known afterwards."""
        if self.solver is None or self.times is None:
            return None
        return evaluations_of(self.course, self.solver, self.times)


def samplers_for(process: Any) -> tuple[str, ...]:
    """Names of the samplers that serve this process."""
    kind = _kind(course_of(process))
    return tuple(name for name, sampler in SAMPLERS.items() if kind in sampler.serves)


DEFAULT = "unipc_2"
"""The sampler of a user who names none: in few evaluations the nearest to real pictures (docs/sampling.md)."""


def plan(process: Any, choice: Choice) -> Plan:
    """Course, solver and times of a choice; ValueError that begins with the option where they do not fit."""
    course = course_of(process)
    kind, known = _kind(course), samplers_for(process)
    if choice.sampler not in known:
        raise ValueError(
            f"sampler is {choice.sampler!r}; expected one of {', '.join(known)} for this process"
        )
    if choice.eta != 0 and choice.sampler not in ("ddim", "ddpm"):
        raise ValueError(f"eta is {choice.eta}; expected 0 for sampler {choice.sampler!r}, it is DDIM's")
    row = SAMPLERS[choice.sampler]
    if row.solver is None:
        if choice.grid is not None:
            raise ValueError(
                f"grid is {choice.grid!r}; expected none, sampler {choice.sampler!r} finds its times"
            )
        return Plan(course, None, None)
    times, solver = _times(course, choice), row.solver(kind, choice)
    if isinstance(solver, Ancestral):
        assert isinstance(course, GaussianCourse)
        process = thinned(course.process, times)
        course, times = GaussianCourse(process), every_step(process)
    solver.rows(course, times if solver.last(course, times[-1]) is None else times[:-1])
    return Plan(course, solver, times)


def sample(
    process: Any, denoise_fn: DenoiseFn, noise: Array, key: Array | None = None, *, choice: Choice
) -> Drawn:
    """Latents (B, H, W, C) from `noise`, and how often the network ran; the whole is one program under jit.

    denoise_fn(x, shown time (B,)): the network. key: one key, or one per sample, for samplers that draw.

    Raises ValueError as `plan` does, and where noise has no source.
    """
    course, solver, times = plan(process, choice)
    if solver is None or times is None:
        return sample_dopri5(course, denoise_fn, noise)
    return draw(course, solver, denoise_fn, noise, key, times=times)


def _kind(course: Course) -> Kind:
    return "gaussian" if isinstance(course, GaussianCourse) else "flow"


def _times(course: Course, choice: Choice) -> np.ndarray:
    if isinstance(choice.grid, tuple):
        return check_times(course, np.array(choice.grid))
    if choice.grid is not None:
        return make_times(course, choice.grid, choice.steps, choice.grid_shift)
    if isinstance(course, FlowCourse) and choice.sampler == "euler_maruyama" and choice.steps > 1:
        return sde_times(course.process, choice.steps)
    timesteps = choice.sampler in ("ddpm", "ddim") and isinstance(course, GaussianCourse)
    return make_times(course, "respaced" if timesteps else "uniform", choice.steps)
