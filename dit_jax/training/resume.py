"""Where a run goes on: from a copy on the hosts, or from a checkpoint."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

from dit_jax.config import Config
from dit_jax.processes import on_lead
from dit_jax.runs.checkpoint import Checkpoints, say
from dit_jax.runs.copies import Copies
from dit_jax.runs.state import TrainState
from dit_jax.runs.weights import checkpoint_steps
from dit_jax.training.program import Program


def copies_of(config: Config, workdir: pathlib.Path, program: Program) -> Copies | None:
    """The emergency copies of the run, if it makes any."""
    t = config.train
    return Copies(workdir, t.local_checkpoint_dir, program.state) if t.local_checkpoint_every else None


def newest_state(
    config: Config, workdir: pathlib.Path, program: Program, checkpoints: Checkpoints, copies: Copies | None,
    check: Callable[[dict[str, Any]], None],
) -> TrainState | None:  # fmt: skip
    """The newest state that is saved: a copy on the hosts, or a checkpoint."""
    t = config.train
    newest = on_lead(lambda: max(checkpoints.steps(), default=0))
    kept = {  # for good: a copy of a later step cannot make up for one that was not finished
        "checkpoints": math.lcm(t.milestone_every, t.checkpoint_every),
        "snapshots": t.snapshot_every if config.optim.ema_sigma_rel else 0,
    }

    def fits(step: int) -> bool:
        wanted = (
            (name, s)
            for name, every in kept.items()
            if every
            for s in range(newest - newest % every + every, step + 1, every)
        )
        return on_lead(lambda: all(s in checkpoint_steps(workdir / name) for name, s in wanted))

    state = copies.restore(newest, check, fits) if copies else None
    if state is not None:
        say(f"going on from step {int(state.step)} in {workdir}, from the copies on the hosts")
        return state
    state = checkpoints.restore(program.state, check)
    if state is not None:
        say(f"going on from step {int(state.step)} in {workdir}")
    return state
