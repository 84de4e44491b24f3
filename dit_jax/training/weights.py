"""Network weights out of and into a run's checkpoints, without the rest of the training state."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from dit_jax.config import Config, ConfigError, from_json
from dit_jax.models.dit import build_model
from dit_jax.training.checkpoint import CHECKSUMS, CheckpointError, file_checksums, find_damage
from dit_jax.training.ema import num_averages
from dit_jax.training.state import init_params

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


def save_weights(directory: pathlib.Path, step: int, params: Any) -> None:
    """Write weights as a checkpoint that `load_weights` reads, for a run that only samples or fine-tunes."""
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = directory.absolute() / f".{step}.unfinished"
    with ocp.StandardCheckpointer() as writer:
        writer.save(unfinished / "params", params)
        writer.save(unfinished / "ema", (params,))
        writer.wait_until_finished()
    (unfinished / CHECKSUMS).write_text(json.dumps(file_checksums(unfinished), indent=1))
    os.rename(unfinished, directory / str(step))


def initial_weights(config: Config, fresh: Any) -> Any:
    """Parameters for a new run from the averaged weights of the run in `config.train.init_from`.

    The label table is taken from `fresh`, this run's own first parameters, if its number of rows differs.
    Raises ConfigError, naming the parameter, where anything else does.
    """
    source = pathlib.Path(config.train.init_from)
    if not (source / "config.json").is_file():
        raise ConfigError(
            f"--train.init-from is {source}, which has no config.json; expected the folder of a trained run"
        )
    their_config = from_json((source / "config.json").read_text())
    theirs = jax.eval_shape(
        lambda key: init_params(build_model(their_config), their_config, key), jax.random.key(0)
    )
    ours = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)}
    mesh = next(iter(ours.values())).sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def layout(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        mine = ours.get(_name(path))
        sharding = mine.sharding if mine is not None and mine.shape == leaf.shape else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    like = jax.tree_util.tree_map_with_path(layout, theirs)
    loaded, _ = load_weights(source / "checkpoints", like, their_config)
    found = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(loaded)}

    def choose(path: Any, mine: jax.Array) -> jax.Array:
        name = _name(path)
        given = found.get(name)
        if given is not None and given.shape == mine.shape:
            return given
        if name == "y_embed/embedding":
            return mine
        shape = "none" if given is None else given.shape
        raise ConfigError(
            f"--train.init-from {source} has {shape} for parameter {name}; this model needs {mine.shape}"
        )

    return jax.tree_util.tree_map_with_path(choose, fresh)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
