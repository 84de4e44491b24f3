"""How parameters begin."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


def xavier_uniform_fused(in_axes: int) -> Initializer:
    """Xavier-uniform on the kernel seen as one matrix: the first `in_axes` axes in, the others out.

    The published DiT initialises the fused qkv matrix and the flattened patch projection this way.
    """

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        fan_in, fan_out = math.prod(shape[:in_axes]), math.prod(shape[in_axes:])
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
