"""Linear multistep solvers: a step is a weighted sum of the state, the latest evaluations and noise.

What tells them apart is the table of weights, made in float64 from the times. Weights of evaluations are (S, K), the
newest first; where fewer than K are there yet, they are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.samplers.course import Times

Array = jax.Array


class Row(NamedTuple):
    """A step from here: keep x + sum(weights * evaluations) + noise z."""

    here: Times
    keep: Any
    weights: Any
    noise: Any


def nothing_yet(x: Array, count: int) -> tuple[Array, ...]:
    """Room for the latest `count` evaluations."""
    return (jnp.zeros_like(x),) * count


def weighted(weights: Array, evaluations: Sequence[Array]) -> Array:
    """The sum of evaluations by their weights (K,)."""
    return sum(weights[k] * evaluation for k, evaluation in enumerate(evaluations))  # type: ignore[return-value]


def advance(
    x: Array, newest: Array, earlier: tuple[Array, ...], row: Row, noise: Array | None
) -> tuple[Array, Any]:
    """(x, evaluations to carry) after the step of a row."""
    evaluations = (newest, *earlier)
    moved = row.keep * x + weighted(row.weights, evaluations)
    if noise is not None:
        moved = moved + row.noise * noise
    return moved, evaluations[:-1]


def padded(weights: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Rows of different lengths as one table (S, width)."""
    return np.stack([np.pad(row, (0, width - len(row))) for row in weights])
