"""The probability-flow ODE from data to noise: the noise of a picture, and its likelihood.

Song et al., arXiv 2011.13456, section 4.3 and appendix D: along dx = f du the log density falls by the divergence
of f, which is estimated by random probes (Hutchinson) or, where there are few dimensions, summed up exactly.

Clean latents are taken as they are at the last time at which the network can be asked: of a Gaussian process its
timestep 0. What is measured is the density there, in nats, of latents, not of pixels.

B batch, H height, W width, C channels of the latent; D = H W C; S steps.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import DenoiseFn
from dit_jax.samplers.course import Course, Times, course_of
from dit_jax.samplers.grid import make_times
from dit_jax.samplers.heun import Heun
from dit_jax.samplers.loop import Denoiser, cast, draw
from dit_jax.samplers.noise import keys_for

Array = jax.Array


def encode(process: Any, denoise_fn: DenoiseFn, x0: Array, *, steps: int = 100) -> Array:
    """The noise (B, H, W, C) from which the ODE leads to these clean latents, by Heun's method."""
    course = course_of(process)
    return draw(course, Heun(), denoise_fn, x0, times=_backwards(course, steps)).x


def decode(process: Any, denoise_fn: DenoiseFn, noise: Array, *, steps: int = 100) -> Array:
    """The way back of `encode` through the same times."""
    course = course_of(process)
    return draw(course, Heun(), denoise_fn, noise, times=_backwards(course, steps)[::-1]).x


def log_likelihood(
    process: Any,
    denoise_fn: DenoiseFn,
    x0: Array,
    key: Array | None = None,
    *,
    steps: int = 100,
) -> Array:
    """log p(x0) of each latent, (B,), in nats, by Heun's method in `steps` steps of two evaluations.

    key: one key, or one per sample, for one probe of +1 and -1 that a sample keeps on its whole way: the estimate is
    right on average. None: the exact divergence, D evaluations of a derivative for each evaluation of the network.
    """
    course, batch = course_of(process), x0.shape[0]
    denoiser, times = Denoiser(course, denoise_fn), _backwards(course, steps)
    scale = course.coordinates(times)[0]
    divergence = _divergence(denoiser, None if key is None else _probes(keys_for(key, batch), x0.shape[1:]))

    def body(state: tuple[Array, Array], inputs: tuple[Any, Array]) -> tuple[tuple[Array, Array], None]:
        (x, gained), (row, scales) = state, inputs
        slope, here = divergence(x, row.here)
        guess = row.keep * x + row.width * slope
        second, there = divergence(guess, row.there)
        moved = row.keep * x + 0.5 * row.width * (slope + second)
        # With y = x / scale, the divergence of dy / du by y is that by x times the scale.
        width = row.width / scales[1]
        return (moved, gained + 0.5 * width * (scales[0] * here + scales[1] * there)), None

    rows = cast((Heun().rows(course, times), np.stack([scale[:-1], scale[1:]], axis=-1)))
    start = (jnp.asarray(x0, jnp.float32), jnp.zeros(batch, jnp.float32))
    (noise, gained), _ = jax.lax.scan(body, start, rows)
    sigma, dimensions = float(course.levels(times[-1:]).sigma[0]), math.prod(x0.shape[1:])
    squares = jnp.sum(jnp.square(noise / sigma), axis=tuple(range(1, noise.ndim)))
    prior = -0.5 * squares - dimensions * (0.5 * math.log(2 * math.pi) + math.log(sigma))
    return prior + dimensions * math.log(scale[-1] / scale[0]) + gained


def bits_per_dimension(log_likelihoods: Array, dimensions: int) -> Array:
    """-log2 p over D."""
    return -log_likelihoods / (dimensions * math.log(2))


def _backwards(course: Course, steps: int) -> np.ndarray:
    """Times (steps + 1,) from the data, or the last time that can be asked, to noise."""
    if course.answers(course.end):
        return make_times(course, "uniform", steps)[::-1]
    return make_times(course, "lambda", steps + 1)[:-1][::-1]


def _probes(keys: Array, shape: tuple[int, ...]) -> Array:
    return jax.vmap(lambda key: jax.random.rademacher(key, shape, jnp.float32))(keys)


def _divergence(denoiser: Denoiser, probes: Array | None) -> Any:
    """(x, at) -> the slope (B, H, W, C) and its divergence (B,), by probes or exactly."""

    def along(x: Array, at: Times, direction: Array) -> tuple[Array, Array]:
        slope, change = jax.jvp(lambda x: denoiser.slope(x, at), (x,), (direction,))
        return slope, jnp.sum(direction * change, axis=tuple(range(1, x.ndim)))

    def exactly(x: Array, at: Times) -> tuple[Array, Array]:
        dimensions = math.prod(x.shape[1:])
        units = jnp.eye(dimensions, dtype=x.dtype).reshape(dimensions, 1, *x.shape[1:])

        def add(total: Array, unit: Array) -> tuple[Array, None]:
            return total + along(x, at, jnp.broadcast_to(unit, x.shape))[1], None

        total, _ = jax.lax.scan(add, jnp.zeros(x.shape[0], x.dtype), units)
        return denoiser.slope(x, at), total

    return exactly if probes is None else lambda x, at: along(x, at, probes)
