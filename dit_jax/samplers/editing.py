"""Sampling that starts from, or keeps, something given; and the way of a sample, to be looked at.

B batch, H height, W width, C channels of the latent; S steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.predictions import Point
from dit_jax.diffusion.process import DenoiseFn
from dit_jax.samplers.course import times_at
from dit_jax.samplers.loop import Denoiser, cast, draw
from dit_jax.samplers.table import Choice, plan

Array = jax.Array


class Given(NamedTuple):
    """A clean latent to start from or to keep a part of."""

    x0: Array
    """(B, H, W, C), or (1, H, W, C) for all samples."""
    keep: Array | None = None
    """Where it is kept: 1, elsewhere 0; (1, H, W, 1)."""


class Way(NamedTuple):
    """A sample's states from its start to its end, and the clean latent that the network saw in each."""

    states: Array
    """(S + 1, B, H, W, C); the last one is the sample."""
    x0: Array
    """(S + 1, B, H, W, C); of the last state, itself."""


def spherical(start: Array, end: Array, shares: Array) -> Array:
    """Points (N, ...) on the arc between two noises (...), at these shares (N,) of the way (Shoemake 1985).

    Between independent normal noises a straight line would pass through points that are too near to zero.
    """
    a, b = start.ravel(), end.ravel()
    cosine = jnp.clip(jnp.dot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)), -1.0, 1.0)
    angle, shares = jnp.arccos(cosine), shares.reshape((-1,) + (1,) * start.ndim)
    near = jnp.sin(angle) < 1e-4  # the arc is then no longer than its chord, or has no direction
    sine = jnp.where(near, 1.0, jnp.sin(angle))
    first = jnp.where(near, 1 - shares, jnp.sin((1 - shares) * angle) / sine)
    second = jnp.where(near, shares, jnp.sin(shares * angle) / sine)
    return first * start[None] + second * end[None]


def later_start(steps: int, strength: float) -> int:
    """How many of so many steps are left out where a sample starts from a latent with this share of noise."""
    return steps - max(1, round(strength * steps))


def way(
    process: Any,
    denoise_fn: DenoiseFn,
    noise: Array,
    key: Array | None = None,
    *,
    choice: Choice,
    given: Given | None = None,
    strength: float = 1.0,
) -> Way:
    """All states of samples from `noise` (B, H, W, C).

    given: without `keep`, samples start from it at the time of which a share `strength` of the steps is left, noised
    up to there (SDEdit: Meng et al., arXiv 2108.01073). With it, the kept part is put into every state, noised as
    that is (replacement: Song et al., arXiv 2011.13456, appendix I.2), and the rest drawn around it.

    Raises ValueError as `plan` does, and for a sampler that finds its own times.
    """
    course, solver, times = plan(process, choice)
    if solver is None or times is None:
        raise ValueError(
            f"sampler is {choice.sampler!r}, whose states are its own; expected one with steps, such as heun"
        )
    start = noise
    if given is not None and given.keep is None:
        left_out = later_start(len(times) - 1, strength)
        times = times[left_out:]
        if left_out:
            start = _noised(given.x0, noise, _first(course.levels(times[:1])))

    def paste(x: Array, p: Point) -> Array:
        assert given is not None and given.keep is not None
        return given.keep * _noised(given.x0, noise, p) + (1 - given.keep) * x

    keeps = given is not None and given.keep is not None
    drawn = draw(
        course, solver, denoise_fn, start, key, times=times, keep_states=True, paste=paste if keeps else None
    )
    assert drawn.states is not None
    before = jnp.concatenate([start[None], drawn.states[:-1]])
    denoiser = Denoiser(course, denoise_fn)
    asked = cast(times_at(course, times[:-1]))
    x0 = jax.lax.map(lambda inputs: denoiser.x0(*inputs), (before, asked))
    return Way(jnp.concatenate([start[None], drawn.states]), jnp.concatenate([x0, drawn.states[-1:]]))


def _first(p: Point) -> Point:
    return jax.tree.map(lambda table: table[0], cast(p))


def _noised(x0: Array, noise: Array, p: Point) -> Array:
    return p.alpha * x0 + p.sigma * noise


def moments(steps: int, count: int) -> np.ndarray:
    """Which of states 0..steps a strip of `count` pictures shows: evenly spread, from the first to the last."""
    return np.unique(np.round(np.linspace(0, steps, min(count, steps + 1))).astype(int))
