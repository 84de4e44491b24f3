"""Reverse SDEs from noise to data by Euler-Maruyama, whose diffusion the sampler may choose (SiT, section 2.4)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.flow import DiffusionForm, FlowMatching, diffusion_coefficient
from dit_jax.diffusion.paths import point
from dit_jax.diffusion.predictions import Point
from dit_jax.diffusion.process import DenoiseFn
from dit_jax.diffusion.samplers import keys_for, step_noise_at
from dit_jax.samplers.grid import Times, check_steps, times_at

Array = jax.Array
LastStep = Literal["mean", "euler", "tweedie", "none"]


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
    last_step_size: float = 0.04,
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
    size = 0.0 if last_step == "none" else last_step_size
    start_time, end_time = process.sampling_interval(diffusion_form, size)
    grid = np.linspace(start_time, end_time, check_steps(steps))
    widths = _diffusion(process, diffusion_form, grid, diffusion_norm)
    _check_noise(noise, key, step_noise, steps)
    keys = None if step_noise is not None or key is None else keys_for(key, noise.shape[0])
    dt = (end_time - start_time) / (steps - 1)

    def evaluate(x: Array, at: Times) -> Array:
        return process.predict(denoise_fn, x, jnp.broadcast_to(at.t, x.shape[:1]))

    def drift(x: Array, at: Times, w: Array) -> Array:
        output = evaluate(x, at)
        return process.velocity(output, x, at.point) + w * process.score(output, x, at.point)

    def step(x: Array, inputs: tuple[Array, Times, Array, Array | None]) -> tuple[Array, Array | None]:
        s, at, w, eps = inputs
        if keys is not None:
            eps = step_noise_at(keys, s, x.shape[1:])
        assert eps is not None
        x = x + dt * drift(x, at, w) + jnp.sqrt(2 * w * dt) * eps
        return x, x if return_trajectory else None

    numbers = jnp.arange(steps - 1, dtype=jnp.int32)
    recorded = None if step_noise is None else jnp.asarray(step_noise[: steps - 1], jnp.float32)
    w = jnp.asarray(widths, jnp.float32)
    x, states = jax.lax.scan(
        step, jnp.asarray(noise, jnp.float32), (numbers, times_at(process, grid[:-1]), w[:-1], recorded)
    )
    if last_step == "none":
        return x if states is None else states
    at = jax.tree.map(lambda table: table[0], times_at(process, grid[-1:]))
    x = _last(process, last_step, size, w[-1], evaluate(x, at), x, at.point)
    return x if states is None else jnp.concatenate([states, x[None]])


def _check_noise(noise: Array, key: Array | None, step_noise: Array | None, steps: int) -> None:
    if step_noise is None and key is None:
        raise ValueError("key and step_noise are missing; expected one of them, every step draws noise")
    if step_noise is not None and (len(step_noise) < steps - 1 or step_noise.shape[1:] != noise.shape):
        raise ValueError(
            f"step_noise has shape {step_noise.shape}; expected {(steps - 1, *noise.shape)} or more steps"
        )


def _last(
    process: FlowMatching, kind: LastStep, size: float, w: Array, output: Array, x: Array, p: Point
) -> Array:
    """x after the last step, without noise."""
    score = process.score(output, x, p)
    if kind == "tweedie":
        return (x + p.sigma**2 * score) / p.alpha
    drift = process.velocity(output, x, p)
    return x + size * (drift + w * score if kind == "mean" else drift)


def _diffusion(process: FlowMatching, form: DiffusionForm, grid: np.ndarray, norm: float) -> np.ndarray:
    """w at every time of the grid, float64."""
    with np.errstate(divide="ignore", invalid="ignore"):
        w = diffusion_coefficient(form, grid, point(process.path, grid), norm, np)
    if not np.isfinite(w).all():
        raise ValueError(
            f"diffusion_form {form!r} is infinite at t = {grid[~np.isfinite(w)][0]:g} of path {process.path!r}; "
            "expected a sample_eps above 0, or another form"
        )
    return w
