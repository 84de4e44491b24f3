"""Precision and recall: how many samples lie among the references, and how many references among the samples.

Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (arXiv 1904.06991), as the
ADM evaluator computes it: a set's manifold is the union of balls about its pictures, each up to the third nearest
other picture of the set.

Legend: N pictures of a set, F features, R rows of a block, K blocks of C columns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

NEIGHBOURS = 3
ROWS, COLUMNS = 1024, 4096  # of a block of distances: 16 MiB

Array = jax.Array


@dataclass(frozen=True)
class _Blocks:
    """A set on the device in blocks of columns; what fills the last one up is infinitely far away."""

    points: Array
    """(K, C, F) float32."""
    squares: Array
    """Squared lengths (K, C)."""
    count: int

    @classmethod
    def of(cls, features: np.ndarray) -> _Blocks:
        size = min(COLUMNS, len(features))
        filled = np.pad(features, [(0, -len(features) % size), (0, 0)])
        squares = np.square(filled, dtype=np.float32).sum(axis=1)
        squares[len(features) :] = np.inf
        points = jnp.asarray(filled.reshape(-1, size, features.shape[1]))
        return cls(points, jnp.asarray(squares.reshape(-1, size)), len(features))


def precision_and_recall(
    samples: np.ndarray, references: np.ndarray, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """(share of samples (N, F) in a reference's ball, share of references (M, F) in a sample's ball).

    In float32, a block of distances at a time. Raises ValueError where a set has no `neighbours` other pictures.
    """
    for name, x in (("samples", samples), ("references", references)):
        if x.ndim != 2 or x.shape[1] != references.shape[1] or len(x) <= neighbours:
            raise ValueError(
                f"{name} have shape {x.shape}; expected (above {neighbours}, {references.shape[-1]})"
            )
    centre = references.mean(axis=0, dtype=np.float64)  # shorter vectors lose fewer digits in their squares
    sets = [_Blocks.of((x - centre).astype(np.float32)) for x in (samples, references)]
    of_samples, of_references = (_radii(x, neighbours) for x in sets)
    precision = _inside(sets[0], sets[1], of_references)
    recall = _inside(sets[1], sets[0], of_samples)
    return precision, recall


def _radii(points: _Blocks, neighbours: int) -> np.ndarray:
    """Squared distance (N,) of each point to its neighbour of that number."""
    parts = [
        # The nearest point is the point itself.
        np.asarray(_nearest(rows, squares, points.points, points.squares, neighbours + 1))[:, neighbours]
        for rows, squares in _rows(points)
    ]
    return np.concatenate(parts)[: points.count]


def _inside(points: _Blocks, centres: _Blocks, radii: np.ndarray) -> float:
    """Share of points that lie in a ball about a centre, of these squared radii."""
    filled = np.full(centres.squares.shape, -1, np.float32)
    filled.reshape(-1)[: centres.count] = radii
    found = [
        np.asarray(_covered(rows, squares, centres.points, centres.squares, jnp.asarray(filled)))
        for rows, squares in _rows(points)
    ]
    return float(np.concatenate(found)[: points.count].mean())


def _rows(points: _Blocks) -> list[tuple[Array, Array]]:
    """The points in blocks of rows (R, F), with their squared lengths (R,)."""
    flat, squares = points.points.reshape(-1, points.points.shape[-1]), points.squares.reshape(-1)
    size = min(ROWS, len(flat))
    padding = -len(flat) % size
    flat, squares = jnp.pad(flat, ((0, padding), (0, 0))), jnp.pad(squares, (0, padding))
    return [(flat[i : i + size], squares[i : i + size]) for i in range(0, points.count, size)]


def _distances(rows: Array, row_squares: Array, columns: Array, column_squares: Array) -> Array:
    """Squared distances (R, C)."""
    products = jnp.matmul(rows, columns.T, precision="highest")
    return jnp.maximum(row_squares[:, None] + column_squares[None, :] - 2 * products, 0)


@functools.partial(jax.jit, static_argnames="count")
def _nearest(rows: Array, row_squares: Array, columns: Array, column_squares: Array, count: int) -> Array:
    """The smallest squared distances (R, count) of each row to the columns of all blocks, ascending."""

    def step(best: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        found = jnp.concatenate([best, _distances(rows, row_squares, *block)], axis=1)
        return -jax.lax.top_k(-found, count)[0], None

    start = jnp.full((len(rows), count), jnp.inf)
    return jax.lax.scan(step, start, (columns, column_squares))[0]


@jax.jit
def _covered(rows: Array, row_squares: Array, columns: Array, column_squares: Array, radii: Array) -> Array:
    """Whether each row (R,) is within the squared radius (K, C) of a column."""

    def step(found: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        *column, radius = block
        return found | (_distances(rows, row_squares, *column) <= radius[None, :]).any(axis=1), None

    return jax.lax.scan(step, jnp.zeros(len(rows), bool), (columns, column_squares, radii))[0]
