"""All that a run carries from one step to the next, and how it begins."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from dit_jax.config import Config
from dit_jax.training.ema import num_averages

Params = Any  # nested dict of float32 arrays


@flax.struct.dataclass
class TrainState:
    """A training run between two steps; a checkpoint is exactly this.

    Attributes:
      step: finished steps, int32.
      params: float32 parameters of the network.
      opt_state: optax state.
      ema: `ema.num_averages(config.optim)` averages of the parameters, the main one first.
      skipped: steps whose update was left out because it was not finite, int32.
      bad_streak: how many of those came last, in a row, int32.
      data_offset: added to the step to choose data and draws; grows when a run is rolled back, int32.
      totals: sums of `metrics` since the last line of the log, so that a resumed run logs the same line.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: tuple[Params, ...]
    skipped: jax.Array
    bad_streak: jax.Array
    data_offset: jax.Array
    totals: dict[str, jax.Array]


def zero_totals() -> dict[str, jax.Array]:
    """Sums over no steps. `loss_sum` and `loss_count` have one entry per quarter of the timesteps."""
    names = ("steps", "skipped", "loss", "mse", "vb", "grad_norm", "learning_rate")
    totals = {name: jnp.zeros((), jnp.float32) for name in names}
    return totals | {"loss_sum": jnp.zeros(4, jnp.float32), "loss_count": jnp.zeros(4, jnp.float32)}


def init_params(model: nn.Module, config: Config, key: jax.Array) -> Params:
    """Fresh parameters of the network."""
    m = config.model
    x = jnp.zeros((1, *m.input_size, m.in_channels), jnp.float32)
    zero = jnp.zeros((1,), jnp.int32)
    return model.init(key, x, zero, zero)["params"]


def make_state(params: Params, optimizer: optax.GradientTransformation, config: Config) -> TrainState:
    """The state at step 0 of a run that starts from these parameters."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(params),
        ema=tuple(jax.tree.map(jnp.copy, params) for _ in range(num_averages(config.optim))),
        skipped=zero,
        bad_streak=zero,
        data_offset=zero,
        totals=zero_totals(),
    )


def init_state(
    model: nn.Module, optimizer: optax.GradientTransformation, config: Config, key: jax.Array
) -> TrainState:
    """The state at step 0 with fresh parameters; under `jit(out_shardings=)` it is born sharded."""
    return make_state(init_params(model, config, key), optimizer, config)
