"""Network weights out of a run's checkpoints, without the rest of the training state."""

from __future__ import annotations

import pathlib
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from dit_jax.config import Config
from dit_jax.training.checkpoint import CheckpointError, find_damage
from dit_jax.training.ema import num_averages

Kind = Literal["ema", "params"]


def checkpoint_steps(directory: pathlib.Path) -> list[int]:
    """Steps of the finished checkpoints in a run's checkpoints/ folder, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit())


def load_weights(
    directory: pathlib.Path, like: Any, config: Config, kind: Kind = "ema", step: int | None = None
) -> tuple[Any, int]:
    """(parameters laid out like `like`, the step they are of): the newest checkpoint's, or that of `step`.

    `like` is a tree of `jax.ShapeDtypeStruct` with shardings; `config` the run's own. "ema" is the main average.
    Raises CheckpointError where there is no such checkpoint or its files are damaged.
    """
    steps = checkpoint_steps(directory)
    if not steps:
        raise CheckpointError(
            f"{directory} holds no finished checkpoint; expected the folder of a trained run"
        )
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise CheckpointError(f"--step is {chosen}; {directory} has {', '.join(map(str, steps))}")
    folder = directory.absolute() / str(chosen)
    problem = find_damage(folder)
    if problem:
        raise CheckpointError(f"checkpoint of step {chosen} is damaged: {problem}; --step chooses another")
    with ocp.StandardCheckpointer() as reader:
        if kind == "params":
            return reader.restore(folder / "params", like), chosen
        averages = tuple(jax.tree.map(lambda leaf: leaf, like) for _ in range(num_averages(config.optim)))
        return reader.restore(folder / "ema", averages)[0], chosen
