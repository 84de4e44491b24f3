"""Embeddings of patches, timesteps, labels and positions, and the linear layer they share.

Letters: B batch, N tokens, D width, P patch side, C latent channels, F frequency channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dit_jax.models import float8
from dit_jax.models.products import add_bias, product

Array = jax.Array
Initializer = Callable[..., Array]


def xavier_uniform_fused(in_axes: int) -> Initializer:
    """Xavier-uniform on the kernel seen as one matrix: the first `in_axes` axes in, the others out.

    The published DiT initialises the fused qkv matrix and the flattened patch projection this way.
    """

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        fan_in, fan_out = math.prod(shape[:in_axes]), math.prod(shape[in_axes:])
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Linear(nn.Module):
    """A linear layer from the last axes of x to `features`, computed on flattened tokens.

    Tokens are flattened to one axis before the product, so that the weight's gradient contracts a single
    axis: backends make a plain matrix product of it. The kernel is stored with its axes apart, for sharding.
    as_matrix: it is multiplied as one matrix, whose gradient comes out as the kernel is stored. Where a mesh splits
    one of its inner axes (such as heads), this would gather it: there it must be False.
    quantization: "fp8" computes that product in 8-bit floats (see `float8`); equations stay in `dtype`.
    result: the type of the result (None: `dtype`), for a product in `dtype` that is not to be rounded to it.
    precision: of a product in float32 (None: jax's default, less than float32 on accelerators).
    """

    features: tuple[int, ...]
    in_axes: int = 1
    kernel_init: Initializer | None = None
    dtype: Any = jnp.float32
    quantization: str = "none"
    as_matrix: bool = True
    result: Any = None
    precision: Any = None

    @nn.compact
    def __call__(self, x: Array, equation: str = "") -> Array:
        """x (..., *inputs) -> (..., *features); with an equation, x and the result are as it says."""
        operands, _, of_out = equation.partition("->")
        of_x, _, of_kernel = operands.partition(",")
        sizes = dict(zip(of_x, x.shape, strict=False))
        inputs = tuple(sizes[i] for i in of_kernel[: self.in_axes]) or x.shape[x.ndim - self.in_axes :]
        init = self.kernel_init or xavier_uniform_fused(self.in_axes)
        kernel = self.param("kernel", init, (*inputs, *self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
        x = x.astype(self.dtype)
        if equation:
            outputs = of_kernel[self.in_axes :]
            missing = [axis for axis, letter in enumerate(of_out) if letter not in outputs]
            out = add_bias(product(x, kernel, equation, self.result, self.precision), bias, missing)
        else:
            out = add_bias(self._product(x.reshape(-1, *inputs), kernel), bias, [0])
            out = out.reshape(*x.shape[: x.ndim - self.in_axes], *self.features)
        # Named so that a remat policy can keep it with its bias.
        return checkpoint_name(out, "linear")

    def _product(self, tokens: Array, kernel: Array) -> Array:
        """tokens (T, *inputs) times kernel (*inputs, *features) -> (T, *features)."""
        if self.quantization == "fp8":
            return float8.dot(tokens, kernel, self.in_axes)
        if self.as_matrix:
            rows = math.prod(tokens.shape[1:])
            tokens, kernel = tokens.reshape(-1, rows), kernel.reshape(rows, -1)
            out = product(tokens, kernel, "td,df->tf", self.result, self.precision)
            return out.reshape(-1, *self.features)
        letters = "abcdefgh"[: kernel.ndim]
        inputs, outputs = letters[: self.in_axes], letters[self.in_axes :]
        return product(tokens, kernel, f"t{inputs},{letters}->t{outputs}", self.result, self.precision)


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


def sincos_positions(height: int, width: int, dim: int) -> np.ndarray:
    """Frozen 2D sine-cosine positions (height*width, dim), float32 (MAE, arXiv 2111.06377).

    The first half of the channels encodes the column, the second the row; in each half sines come before
    cosines. Frequencies are computed in float64.
    """

    def encode(positions: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000.0 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
        angles = np.outer(positions, omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.concatenate([encode(columns.ravel()), encode(rows.ravel())], axis=1).astype(np.float32)


def timestep_embedding(t: Array, dim: int = 256, max_period: float = 10000.0) -> Array:
    """Sinusoidal embedding (B,) -> (B, dim) in float32: frequencies max_period^(-i / (dim/2)), cosines first.

    The exponent is rounded to float32 before the exponential, as the published code does: at t near 1000 the
    rounding moves an angle by up to 6e-5, which would otherwise be the largest difference from it.
    """
    half = dim // 2
    exponent = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoid, then an MLP 256 -> D -> D with SiLU, all in float32 on every device: it costs next to nothing."""

    hidden_size: int

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """t (B,) -> (B, D)."""
        linear = functools.partial(
            Linear,
            (self.hidden_size,),
            kernel_init=nn.initializers.normal(0.02),
            precision=jax.lax.Precision.HIGHEST,
        )
        h = linear(name="fc1")(timestep_embedding(t))
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
