"""All that a run carries from one step to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

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


def zero_totals(loss_names: Sequence[str] = ("loss",)) -> dict[str, jax.Array]:
    """Sums over no steps; `loss_names` are the process's.

    `loss_sum` and `loss_count` have one entry per quarter of the noise levels, the least noise first.
    """
    names = ("steps", "skipped", *loss_names, "grad_norm", "learning_rate")
    totals = {name: jnp.zeros((), jnp.float32) for name in names}
    return totals | {"loss_sum": jnp.zeros(4, jnp.float32), "loss_count": jnp.zeros(4, jnp.float32)}
