"""Dormand & Prince's adaptive method of fifth order on the probability-flow ODE, through diffrax.

Every sample has steps of its own, by its own error, so that it does not depend on the batch around it: the network
runs on the whole batch until the last sample has arrived.

B batch, H height, W width, C channels of the latent.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import DenoiseFn
from dit_jax.samplers.adams import AdamsBashforth
from dit_jax.samplers.course import Course, Times
from dit_jax.samplers.loop import Denoiser, Drawn, cast

Array = jax.Array

STAGES = 6  # new evaluations of a step of dopri5, refused or not: its seventh is the next step's first
FIRST_STEP = 0.01  # share of the way; the controller takes it from there


def sample_dopri5(
    course: Course,
    denoise_fn: DenoiseFn,
    noise: Array,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_steps: int = 1000,
) -> Drawn:
    """Latents (B, H, W, C) from `noise`; `evaluations` is the number of times that the network ran, an int32 array.

    rtol, atol: SiT's defaults. max_steps: of one sample, refused ones included; NaN for a sample that needs more.
    A process that has no network at its end, as the Gaussian one, goes to its last timestep, then takes x0.

    Raises ValueError for tolerances that are not above 0.
    """
    import diffrax  # it takes as long to import as the rest of the samplers

    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol is {rtol} and atol {atol}; expected numbers above 0")
    denoiser = Denoiser(course, denoise_fn)
    first, last = (float(c) for c in course.clock(np.array([course.start, course.last_asked])))
    start = jnp.asarray(noise, jnp.float32)
    field, closed_over = _of_one_sample(denoiser, start)

    def solve(x: Array) -> tuple[Array, Array]:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda c, x, args: field(x, jnp.asarray(c, jnp.float32), args)),
            diffrax.Dopri5(), first, last, FIRST_STEP * (last - first), x, closed_over,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=max_steps, throw=False,
        )  # fmt: skip
        done = solution.result == diffrax.RESULTS.successful
        assert solution.ys is not None
        return jnp.where(done, solution.ys[0], jnp.nan), solution.stats["num_steps"]

    x, steps = jax.vmap(solve)(start)
    evaluations = STAGES * steps.max() + 1
    if course.last_asked != course.end:
        euler = AdamsBashforth()
        rows = cast(euler.rows(course, np.array([course.last_asked, course.end])))
        row = jax.tree.map(lambda table: table[0], rows)
        x, _ = euler.step(denoiser, x, (), row, None)
        evaluations = evaluations + 1
    return Drawn(x, None, evaluations)


def _of_one_sample(denoiser: Denoiser, x: Array) -> tuple[Any, Any]:
    """(field, what it closes over): field(x, c, closed over) is dx/dc of one sample (H, W, C) at clock c.

    It is to be mapped over the batch: the network then sees the batch whole, as it was built to. What the network
    closes over, such as parameters, is passed through the loops by hand: a rule for mapping does not do that.
    """
    import equinox

    def of_batch(x: Array, c: Array) -> Array:
        at: Times = jax.vmap(denoiser.course.at_clock)(c)
        shaped = jax.tree.map(lambda level: level.reshape(level.shape + (1,) * (x.ndim - 1)), at.point)
        prediction = denoiser.course.predict(denoiser.denoise_fn, x, at.t)
        return denoiser.course.velocity(prediction, x, shaped)

    clocks = jnp.zeros(x.shape[0], jnp.float32)
    arrays, rest = equinox.partition(equinox.filter_closure_convert(of_batch, x, clocks), equinox.is_array)

    @jax.custom_batching.custom_vmap
    def of_one(x: Array, c: Array, arrays: Any) -> Array:
        return jnp.full_like(x, jnp.nan)  # gives the shape only: a network of B labels takes no single sample

    @of_one.def_vmap
    def _whole(size: int, mapped: Any, x: Array, c: Array, arrays: Any) -> tuple[Array, bool]:
        x_mapped, c_mapped, _ = mapped
        x = x if x_mapped else jnp.broadcast_to(x, (size, *x.shape))
        c = c if c_mapped else jnp.broadcast_to(c, (size,))
        return equinox.combine(arrays, rest)(x, c), True

    return of_one, arrays
