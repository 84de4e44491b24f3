"""The Inception network of the field's metrics: TensorFlow's graph of 2015-12-05, and how pictures get to its size.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567), with what the
published graph has of its own: 1,008 classes, average pools that do not count their padding, a max pool in the last
block's pool branch. Modules have the names of PyTorch's ports; weights come in through `dit_jax.interop.inception`.

Legend: B batch, h w sides of pictures, C channels.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299  # side of the pictures that the network sees
NUM_LOGITS = 1008
SPATIAL_CHANNELS = 7  # of the 192, so that the 17x17 places give 2,023 features
NORM_EPS = 1e-3

Convention = Literal["adm", "pytorch-fid"]

# ------------------------------------------------------------------------------------------- pictures


def resize_matrix(size: int, convention: Convention) -> np.ndarray:
    """(299, size) float32: bilinear interpolation along one axis, without antialiasing.

    Pixel i of the result lies at i * size / 299 of the picture under `adm` (TensorFlow 1's resize_bilinear, as in the
    ADM evaluator and torch-fidelity), at (i + 1/2) * size / 299 - 1/2 under `pytorch-fid` (PyTorch's interpolate).
    """
    at = np.arange(SIZE, dtype=np.float32)
    scale = np.float32(size / SIZE)
    at = (
        at * scale if convention == "adm" else np.maximum((at + np.float32(0.5)) * scale - np.float32(0.5), 0)
    )
    low = np.minimum(at.astype(np.int64), size - 1)
    high, share = np.minimum(low + 1, size - 1), at - low.astype(np.float32)
    matrix = np.zeros((SIZE, size), np.float32)
    rows = np.arange(SIZE)
    matrix[rows, low] += 1 - share
    matrix[rows, high] += share
    return matrix


def network_input(images: jax.Array, convention: Convention) -> jax.Array:
    """Pictures (B, h, w, 3) uint8 as the network sees them, (B, 299, 299, 3) float32 in about [-1, 1].

    `adm`: (x - 128) / 128 of the resized 0..255. `pytorch-fid`: 2 x - 1 of the resized 0..1.
    """
    down, across = (jnp.asarray(resize_matrix(side, convention)) for side in images.shape[1:3])
    x = images.astype(jnp.float32)
    x = x / 255 if convention == "pytorch-fid" else x
    x = jnp.einsum("ih,bhwc,jw->bijc", down, x, across, precision="highest")
    return (x - 128) / 128 if convention == "adm" else 2 * x - 1


# -------------------------------------------------------------------------------------------- network


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation by stored statistics, ReLU. Strided ones have no padding."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the block's output, the bare convolution's)."""
        padding = "VALID" if self.stride > 1 else self.padding
        raw = nn.Conv(self.features, self.kernel, self.stride, padding, use_bias=False, name="conv")(x)
        norm = nn.BatchNorm(use_running_average=True, epsilon=NORM_EPS, name="bn")
        return nn.relu(norm(raw)), raw


def _conv(
    name: str, features: int, height: int, width: int, x: jax.Array, stride: int = 1, padding: str = "SAME"
) -> jax.Array:
    return ConvNorm(features, (height, width), stride, padding, name=name)(x)[0]


def _average(x: jax.Array) -> jax.Array:
    """3x3 means of the pixels that are there: the padding is not counted."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _halved(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2))


class InceptionA(nn.Module):
    """Branches of 1x1, 5x5, twice 3x3 and a pool, at 35x35."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        five = _conv("branch5x5_2", 64, 5, 5, _conv("branch5x5_1", 48, 1, 1, x))
        three = _conv("branch3x3dbl_2", 96, 3, 3, _conv("branch3x3dbl_1", 64, 1, 1, x))
        three = _conv("branch3x3dbl_3", 96, 3, 3, three)
        pool = _conv("branch_pool", self.pool_features, 1, 1, _average(x))
        return jnp.concatenate([_conv("branch1x1", 64, 1, 1, x), five, three, pool], axis=-1)


class InceptionB(nn.Module):
    """From 35x35 to 17x17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        double = _conv("branch3x3dbl_2", 96, 3, 3, _conv("branch3x3dbl_1", 64, 1, 1, x))
        double = _conv("branch3x3dbl_3", 96, 3, 3, double, stride=2)
        return jnp.concatenate([_conv("branch3x3", 384, 3, 3, x, stride=2), double, _halved(x)], axis=-1)


class InceptionC(nn.Module):
    """Branches of 1x1, 7x7 and twice 7x7 in rows and columns, and a pool, at 17x17."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the block's output, the bare convolution of its first branch)."""
        c = self.width
        one, raw = ConvNorm(192, name="branch1x1")(x)
        seven = _conv("branch7x7_2", c, 1, 7, _conv("branch7x7_1", c, 1, 1, x))
        seven = _conv("branch7x7_3", 192, 7, 1, seven)
        double = _conv("branch7x7dbl_2", c, 7, 1, _conv("branch7x7dbl_1", c, 1, 1, x))
        double = _conv("branch7x7dbl_4", c, 7, 1, _conv("branch7x7dbl_3", c, 1, 7, double))
        double = _conv("branch7x7dbl_5", 192, 1, 7, double)
        pool = _conv("branch_pool", 192, 1, 1, _average(x))
        return jnp.concatenate([one, seven, double, pool], axis=-1), raw


class InceptionD(nn.Module):
    """From 17x17 to 8x8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _conv("branch3x3_2", 320, 3, 3, _conv("branch3x3_1", 192, 1, 1, x), stride=2)
        seven = _conv("branch7x7x3_2", 192, 1, 7, _conv("branch7x7x3_1", 192, 1, 1, x))
        seven = _conv("branch7x7x3_3", 192, 7, 1, seven)
        seven = _conv("branch7x7x3_4", 192, 3, 3, seven, stride=2)
        return jnp.concatenate([three, seven, _halved(x)], axis=-1)


class InceptionE(nn.Module):
    """Branches of 1x1, 3x3 and twice 3x3, the last layer split into row and column, and a pool, at 8x8."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _conv("branch3x3_1", 384, 1, 1, x)
        double = _conv("branch3x3dbl_2", 384, 3, 3, _conv("branch3x3dbl_1", 448, 1, 1, x))
        pool = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.max_pool else _average(x)
        branches = [
            _conv("branch1x1", 320, 1, 1, x),
            _conv("branch3x3_2a", 384, 1, 3, three),
            _conv("branch3x3_2b", 384, 3, 1, three),
            _conv("branch3x3dbl_3a", 384, 1, 3, double),
            _conv("branch3x3dbl_3b", 384, 3, 1, double),
            _conv("branch_pool", 192, 1, 1, pool),
        ]
        return jnp.concatenate(branches, axis=-1)


class Inception(nn.Module):
    """Pictures (B, 299, 299, 3) as of `network_input` -> features of the field's metrics, by name.

    `pool` (B, 2048): the mean over places of the last block, for FID, KID, precision and recall. `spatial` (B, 2023):
    7 channels of the bare 1x1 convolution of Mixed_6d, TensorFlow's mixed_6/conv, for sFID. `logits` (B, 1008):
    without the bias that the file holds, for the Inception Score.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        x = _conv("Conv2d_1a_3x3", 32, 3, 3, x, stride=2)  # (B, 149, 149, 32)
        x = _conv("Conv2d_2a_3x3", 32, 3, 3, x, padding="VALID")  # (B, 147, 147, 32)
        x = _halved(_conv("Conv2d_2b_3x3", 64, 3, 3, x))  # (B, 73, 73, 64)
        x = _conv("Conv2d_3b_1x1", 80, 1, 1, x)
        x = _halved(_conv("Conv2d_4a_3x3", 192, 3, 3, x, padding="VALID"))  # (B, 35, 35, 192)
        for name, features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = InceptionA(features, name=name)(x)
        x = InceptionB(name="Mixed_6a")(x)  # (B, 17, 17, 768)
        raw = {}
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x, raw[name] = InceptionC(width, name=name)(x)
        x = InceptionD(name="Mixed_7a")(x)  # (B, 8, 8, 1280)
        x = InceptionE(max_pool=False, name="Mixed_7b")(x)
        x = InceptionE(max_pool=True, name="Mixed_7c")(x)  # (B, 8, 8, 2048)
        pool = x.mean(axis=(1, 2))
        logits = nn.Dense(NUM_LOGITS, use_bias=False, name="fc")(pool)
        spatial = raw["Mixed_6d"][..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        return {"pool": pool, "spatial": spatial, "logits": logits}
