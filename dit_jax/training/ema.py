"""Exponential moving averages of the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.config import OptimConfig


def num_averages(config: OptimConfig) -> int:
    """How many averages a run keeps."""
    return 1


def decays(config: OptimConfig, updates: jax.Array) -> tuple[jax.Array, ...]:
    """The decay of each average at the update that follows `updates` earlier ones, n below.

    min(decay, (1 + n) / (10 + n)): at a fixed 0.9999 the average would be the random start for the first
    tens of thousands of steps.
    """
    n = updates.astype(jnp.float32)
    return (jnp.minimum(config.ema_decay, (1 + n) / (10 + n)),)


def update(average: Any, params: Any, decay: jax.Array) -> Any:
    """decay * average + (1 - decay) * params."""
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
