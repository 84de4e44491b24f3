"""How the averages of the parameters move with each update (see `runs.averages`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.config import OptimConfig
from dit_jax.models.lora import only_lora
from dit_jax.runs.averages import sigma_rel_to_gamma


def rates(config: OptimConfig, updates: jax.Array) -> tuple[jax.Array, ...]:
    """The weight of the new parameters in each average, float32, at the update that follows `updates` earlier ones.

    That is 1 - decay, with n for `updates`. Exponential: the decay is min(decay, (1 + n) / (10 + n)); at a fixed
    0.9999 the average would be the random start for the first tens of thousands of steps. Power function: it is
    (1 - 1/t)^(gamma + 1) with t = n + 1 (EDM2, eq. 2). After millions of updates a float32 keeps few digits of
    what such a decay lacks to 1, so the decay itself is not computed.
    """
    n = updates.astype(jnp.float32)
    fixed = tuple(jnp.maximum(1 - d, 9 / (10 + n)) for d in (config.ema_decay, *config.ema_more))
    log = jnp.log1p(-1 / (n + 1))
    power = tuple(-jnp.expm1((sigma_rel_to_gamma(s) + 1) * log) for s in config.ema_sigma_rel)
    return fixed + power


def decays(config: OptimConfig, updates: jax.Array) -> tuple[jax.Array, ...]:
    """The decay of each average, rounded to float32: 1 - `rates`."""
    return tuple(1 - rate for rate in rates(config, updates))


def update(average: Any, params: Any, rate: jax.Array) -> Any:
    """(1 - rate) * average + rate * params, of those that are trained."""
    return only_lora(jax.tree.map(lambda a, p: a + rate * (p - a), average, params), average)
