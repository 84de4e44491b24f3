"""How a run's state begins."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from dit_jax.config import Config
from dit_jax.diffusion.create import create_process
from dit_jax.models.create import Model, init_params
from dit_jax.runs.averages import num_averages
from dit_jax.runs.state import Params, TrainState, zero_totals


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
        totals=zero_totals(create_process(config.diffusion).loss_names),
    )


def init_state(
    model: Model, optimizer: optax.GradientTransformation, config: Config, key: jax.Array
) -> TrainState:
    """The state at step 0 with fresh parameters; under `jit(out_shardings=)` it is born sharded."""
    return make_state(init_params(model, config, key), optimizer, config)
