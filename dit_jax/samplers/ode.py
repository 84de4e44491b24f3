"""The probability-flow ODE of flow matching with fixed steps: Euler, Heun (SiT, arXiv 2401.08740, section 2.3)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.flow import FlowMatching
from dit_jax.diffusion.process import DenoiseFn
from dit_jax.samplers.adams import AdamsBashforth
from dit_jax.samplers.course import FlowCourse
from dit_jax.samplers.heun import Heun
from dit_jax.samplers.loop import Solver, draw

Array = jax.Array


def sample_ode(
    process: FlowMatching,
    denoise_fn: DenoiseFn,
    noise: Array,
    *,
    steps: int = 250,
    method: Literal["euler", "heun"] = "euler",
    return_trajectory: bool = False,
) -> Array:
    """Clean latents (B, H, W, C) from `noise`, their start at the process's first sampling time.

    denoise_fn(x, shown time (B,)): the network. steps: points in time, as in SiT: 250 are 249 steps, each of one
    evaluation (euler) or two (heun). return_trajectory: the states at all points, (steps, B, H, W, C).

    Raises ValueError for another method or fewer than 2 points.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"method is {method!r}; expected euler or heun")
    solver: Solver = AdamsBashforth() if method == "euler" else Heun()
    times = np.linspace(*process.sampling_interval(), check_points(steps))
    drawn = draw(FlowCourse(process), solver, denoise_fn, noise, times=times, keep_states=return_trajectory)
    if drawn.states is None:
        return drawn.x
    return jnp.concatenate([jnp.asarray(noise, jnp.float32)[None], drawn.states])


def check_points(steps: int) -> int:
    """The number of points in time; ValueError for fewer than 2."""
    if steps < 2:
        raise ValueError(f"steps is {steps}; expected at least 2 points in time")
    return steps
