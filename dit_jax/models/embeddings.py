"""Embeddings of patches, timesteps, labels and positions.

Letters: B batch, N tokens, D width, P patch side, C latent channels, F frequency channels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models.compute import Compute
from dit_jax.models.linear import Linear

Array = jax.Array


def patchify(x: Array, patch: int) -> Array:
    """(B, H, W, C) -> (B, N, P*P*C): rows of patches, each flattened as (row, column, channel)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x: Array, patch: int, size: tuple[int, int]) -> Array:
    """(B, N, P*P*C) -> (B, H, W, C), the inverse of `patchify` for a latent of `size` (H, W)."""
    (h, w), (b, _, last) = size, x.shape
    x = x.reshape(b, h // patch, w // patch, patch, patch, last // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, last // patch**2)


def sincos_positions(height: int, width: int, dim: int, base: tuple[int, int] | None = None) -> np.ndarray:
    """Frozen 2D sine-cosine positions (height*width, dim), float32 (MAE, arXiv 2111.06377).

    The first half of the channels encodes the column, the second the row; in each half sines come before
    cosines. Frequencies are computed in float64. A grid of another size than `base`, the one whose first entry is at
    (0, 0), lies around the same middle at the same distances, as Stable Diffusion 3's do (arXiv 2403.03206, section
    5.3.2): a smaller one is cut from the base's table, a larger one goes beyond it on all sides.
    """
    rows, columns = base or (height, width)
    return _positions_at(
        (rows - height) // 2 + np.arange(height), (columns - width) // 2 + np.arange(width), dim
    )


def cropped_positions(height: int, width: int, dim: int, side: int, base: int) -> np.ndarray:
    """The middle (height*width, dim) of a table of side x side such positions that lie base / side apart, float32.

    Stable Diffusion 3 is shown pictures of any size so (arXiv 2403.03206, section 5.3.2).
    """
    apart = base / side
    rows, columns = (((side - n) // 2 + np.arange(n)) * apart for n in (height, width))
    return _positions_at(rows, columns, dim)


def _positions_at(rows: np.ndarray, columns: np.ndarray, dim: int) -> np.ndarray:
    def encode(positions: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000.0 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
        angles = np.outer(positions, omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.meshgrid(rows, columns, indexing="ij")
    return np.concatenate([encode(column.ravel()), encode(row.ravel())], axis=1).astype(np.float32)


def timestep_embedding(t: Array, dim: int = 256, max_period: float = 10000.0, shift: int = 0) -> Array:
    """Sinusoidal embedding (B,) -> (B, dim) in float32: frequencies max_period^(-i / (dim/2 - shift)), cosines first.

    The exponent is rounded to float32 before the exponential, as the published code does: at t near 1000 the
    rounding moves an angle by up to 6e-5, which would otherwise be the largest difference from it.
    """
    half = dim // 2
    exponent = (
        np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    )
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoid, then an MLP 256 -> D -> D with SiLU, all in float32 on every device: it costs next to nothing."""

    hidden_size: int
    compute: Compute = Compute()
    sinusoid: Callable[[Array], Array] = timestep_embedding

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """t (B,) -> (B, D)."""
        linear = functools.partial(
            Linear,
            (self.hidden_size,),
            kernel_init=nn.initializers.normal(0.02),
            compute=dataclasses.replace(self.compute, dtype=jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        h = linear(name="fc1")(self.sinusoid(t))
        return linear(name="fc2")(nn.silu(h))


class LabelEmbedder(nn.Module):
    """A table of class embeddings; with label dropout its last row is the null class.

    A label outside the table gives NaN, never a neighbour's row.
    """

    num_classes: int
    hidden_size: int
    with_null: bool

    @nn.compact
    def __call__(self, y: Array) -> Array:
        """y (B,) int -> (B, D) float32."""
        rows = self.num_classes + int(self.with_null)
        table = self.param("embedding", nn.initializers.normal(0.02), (rows, self.hidden_size), jnp.float32)
        # Without the last option a negative label would count from the end of the table: -1 would be the null class.
        return jnp.asarray(table).at[y].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
