"""Points in time of a sampler, with what is known of each before it runs: in float64, cast once."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.flow import FlowMatching
from dit_jax.diffusion.paths import point
from dit_jax.diffusion.predictions import Point


class Times(NamedTuple):
    """Times and the path's levels at each: arrays (S,), or numbers inside a loop over them."""

    t: jnp.ndarray
    point: Point


def times_at(process: FlowMatching, grid: np.ndarray) -> Times:
    """The table of a loop over these times (S,) float64."""
    levels = Point(*(jnp.asarray(value, jnp.float32) for value in point(process.path, grid)))
    return Times(jnp.asarray(grid, jnp.float32), levels)


def check_steps(steps: int) -> int:
    """The number of points in time; ValueError for fewer than 2."""
    if steps < 2:
        raise ValueError(f"steps is {steps}; expected at least 2 points in time")
    return steps
