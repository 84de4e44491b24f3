"""The probability-flow ODE from noise to data with fixed steps: Euler, Heun (SiT, arXiv 2401.08740, section 2.3)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.flow import FlowMatching
from dit_jax.diffusion.process import DenoiseFn
from dit_jax.samplers.grid import Times, check_steps, times_at

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
    grid = np.linspace(*process.sampling_interval(), check_steps(steps))
    now, then = times_at(process, grid[:-1]), times_at(process, grid[1:])

    def velocity(x: Array, at: Times) -> Array:
        t = jnp.broadcast_to(at.t, x.shape[:1])
        return process.velocity(process.predict(denoise_fn, x, t), x, at.point)

    def step(x: Array, inputs: tuple[Times, Times, Array]) -> tuple[Array, Array | None]:
        here, there, dt = inputs
        v = velocity(x, here)
        moved = x + dt * v
        if method == "heun":
            moved = x + dt * 0.5 * (v + velocity(moved, there))
        return moved, moved if return_trajectory else None

    start = jnp.asarray(noise, jnp.float32)
    end, states = jax.lax.scan(step, start, (now, then, jnp.asarray(np.diff(grid), jnp.float32)))
    return end if states is None else jnp.concatenate([start[None], states])
