"""AdamW as the config states it."""

from __future__ import annotations

from typing import Any

import jax
import optax

from dit_jax.config import Config
from dit_jax.models.lora import labels


def learning_rate(config: Config) -> optax.Schedule:
    """Updates done so far -> learning rate: linear warm-up, then constant, cosine or linear to zero."""
    o, steps = config.optim, config.train.steps
    decay_steps = max(steps - o.warmup_steps, 1)
    after: optax.Schedule = {
        "constant": optax.constant_schedule(o.learning_rate),
        "cosine": optax.cosine_decay_schedule(o.learning_rate, decay_steps),
        "linear": optax.linear_schedule(o.learning_rate, 0.0, decay_steps),
    }[o.schedule]
    if o.warmup_steps == 0:
        return after
    # Update n of the warm-up runs at (n + 1) / warmup_steps of the peak, so that the first one moves too.
    warmup = optax.linear_schedule(
        o.learning_rate / o.warmup_steps, o.learning_rate, max(o.warmup_steps - 1, 1)
    )
    return optax.join_schedules([warmup, after], [o.warmup_steps])


def is_matrix(params: Any) -> Any:
    """True for kernels and embedding tables. The stacked layer axis makes biases 2-D too, so names decide."""

    def decayed(path: tuple[Any, ...], _: Any) -> bool:
        return path[-1].key in ("kernel", "embedding", "down", "up")

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by the global norm (if any), then AdamW with decay on matrices only; of `lora/` alone where it is."""
    o = config.optim
    adamw = optax.adamw(learning_rate(config), o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=is_matrix)
    optimizer = optax.chain(optax.clip_by_global_norm(o.grad_clip), adamw) if o.grad_clip > 0 else adamw
    if config.lora.rank == 0:
        return optimizer
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
