"""Network weights out of and into a run's checkpoints, without the rest of the training state."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dit_jax import paths
from dit_jax.conditions import condition_of, shared_rows
from dit_jax.config import Config, ConfigError, run_config
from dit_jax.models.create import build_model, init_params
from dit_jax.models.lora import LORA, merged
from dit_jax.runs.averages import num_averages
from dit_jax.runs.checkpoint import CHECKSUMS, CheckpointError, file_checksums, say, shared_damage
from dit_jax.runs.saving import orbax_path, told_of_store
from dit_jax.runs.workdir import read_metadata

Kind = Literal["ema", "params"]


def checkpoint_steps(directory: pathlib.Path) -> list[int]:
    """Steps of the finished checkpoints in a run's checkpoints/ folder, ascending."""
    names = [name for name in paths.names_in(directory) if name.isdigit()]
    if paths.is_remote(directory):  # one that is being written has its name there
        names = [name for name in names if (directory / name / "commit_success.txt").is_file()]
    return sorted(map(int, names))


def load_weights(
    directory: pathlib.Path,
    like: Any,
    config: Config,
    kind: Kind = "ema",
    step: int | None = None,
    option: str = "--step",
    merge: bool = True,
) -> tuple[Any, int]:
    """(parameters laid out like `like`, the step they are of): the newest checkpoint's, or that of `step`.

    `like` is a tree of `jax.ShapeDtypeStruct` with shardings; `config` the run's own; `option` names the step to
    users. "ema" is the main average. Of a run with low-rank adaptation they are the network's own, moved by it, but
    with `merge` off. Only what is asked for is read, and checked, by process 0. Raises
    CheckpointError where there is no such checkpoint, its files are damaged, or its network is not the one that
    `like` describes.
    """
    while True:
        chosen = _choose_step(directory, step, option)
        try:
            with told_of_store(directory):
                found = _read(directory, chosen, like, config, kind)
            if merge and config.lora.rank:
                found = jax.jit(merged, static_argnums=1)(found, config.lora)
            return found, chosen
        except Exception as error:
            there = checkpoint_steps(directory)
            if jax.process_count() > 1 or (chosen in there and (step is not None or chosen == there[-1])):
                raise
            if step is not None:
                raise CheckpointError(f"checkpoint of step {step} was deleted while it was read") from error
            # The run goes on, and has deleted this one, or is about to: there is a newer one.


def _choose_step(directory: pathlib.Path, step: int | None, option: str) -> int:
    """`step`, or the newest that process 0 sees; raises CheckpointError where there is none."""
    steps = checkpoint_steps(directory)
    if not steps:
        raise CheckpointError(
            f"{directory} holds no finished checkpoint; expected the folder of a trained run"
        )
    if step is not None and step not in steps:
        raise CheckpointError(f"{option} is {step}; {directory} has {', '.join(map(str, steps))}")
    chosen = steps[-1] if step is None else step
    return int(multihost_utils.broadcast_one_to_all(chosen)) if jax.process_count() > 1 else chosen


def _read(directory: pathlib.Path, step: int, like: Any, config: Config, kind: Kind) -> Any:
    folder = orbax_path(directory) / str(step)
    problem = shared_damage(directory / str(step), kind)
    if problem:
        raise CheckpointError(f"checkpoint of step {step} is damaged: {problem}; --step chooses another")
    others = num_averages(config.optim) - 1 if kind == "ema" else 0
    # What is not asked for has a placeholder in its place.
    nothing = jax.tree.map(lambda _: ocp.PLACEHOLDER, like)
    wanted = like if kind == "params" else (like, *[nothing] * others)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        described = reader.metadata(folder / kind).item_metadata
        if described is None:  # Orbax keeps the reason to itself
            raise CheckpointError(
                f"checkpoint of step {step} in {directory} cannot be read: what describes its arrays is not to be had"
            )
        stored = described.tree
        if kind == "ema" and len(stored) != others + 1:
            raise CheckpointError(
                f"checkpoint of step {step} in {directory} holds {len(stored)} averages; {directory.parent}"
                f"/config.json says {others + 1} (optim.ema_more and optim.ema_sigma_rel, after the main one)"
            )
        _check_shapes(stored if kind == "params" else stored[0], like, config, directory, step)
        restore = ocp.args.PyTreeRestore(item=wanted, restore_args=jax.tree.map(_restore_args, wanted))
        found = reader.restore(folder / kind, args=restore)
    return found if kind == "params" else found[0]


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if leaf is ocp.PLACEHOLDER:
        return ocp.RestoreArgs()
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _check_shapes(stored: Any, like: Any, config: Config, directory: pathlib.Path, step: int) -> None:
    """Raises CheckpointError, naming the first parameter in which the checkpoint is of another network."""
    there, here = ({_name(path): leaf.shape for path, leaf in _leaves(tree)} for tree in (stored, like))
    for name in sorted(there.keys() | here.keys()):
        found, expected = there.get(name), here.get(name)
        if found != expected:
            text = f"{name} {found or 'absent'}, the model in {directory.parent / 'config.json'} {expected or 'none'}"
            if found and expected and expected[0] == config.model.depth and found[1:] == expected[1:]:
                text += f": --model.depth is {found[0]} there, {expected[0]} here"
            raise CheckpointError(f"checkpoint of step {step} in {directory} has {text}")


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def save_weights(directory: pathlib.Path, step: int, params: Any) -> None:
    """Write weights as a checkpoint that `load_weights` reads, for a run that only samples or fine-tunes."""
    remote = paths.is_remote(directory)
    folder = directory / (str(step) if remote else f".{step}.unfinished")
    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as writer:
        writer.save(orbax_path(folder) / "params", params)
        writer.save(orbax_path(folder) / "ema", (params,))
        writer.wait_until_finished()
    (folder / CHECKSUMS).write_text(json.dumps(file_checksums(folder), indent=1))
    if remote:
        (folder / "commit_success.txt").write_text("whole")
    else:
        os.rename(folder, directory / str(step))


def initial_weights(config: Config, fresh: Any, label_names: Sequence[str] = ()) -> Any:
    """Parameters for a new run from the averaged weights of the run in `config.train.init_from`.

    `fresh` are this run's own first parameters, `label_names` its classes. They decide what becomes of the label
    table (`shared_rows`). Says on stderr which weights these are, and where the process differs from theirs.
    Raises ConfigError, naming the parameter, where anything but the label table's rows differs.
    """
    option, source = "--train.init-from", paths.to_path(config.train.init_from)
    their_config = run_config(option, source)
    their_names = read_metadata(option, source).label_names if (source / "dataset.json").is_file() else ()
    theirs = jax.eval_shape(
        lambda key: init_params(build_model(their_config), their_config, key), jax.random.key(0)
    )
    ours = {_name(path): leaf for path, leaf in _leaves(fresh)}
    mesh = next(iter(ours.values())).sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def layout(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        mine = ours.get(_name(path))
        sharding = mine.sharding if mine is not None and mine.shape == leaf.shape else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    like = jax.tree_util.tree_map_with_path(layout, theirs)
    loaded, step = load_weights(source / "checkpoints", like, their_config)
    found = {_name(path): leaf for path, leaf in _leaves(loaded)}
    kind, table = condition_of(config), condition_of(config).table
    rows = shared_rows(kind, label_names, condition_of(their_config), their_names)
    say(
        f"starting from the averaged weights of step {step} in {source}"
        + (f", {len(rows)} of {len(ours[table])} rows of the label table among them" if table in ours else "")
    )
    _warn_of_another_process(config, their_config)
    if config.model.convention != their_config.model.convention:
        say(
            f"warning: those weights are computed with --model.convention {their_config.model.convention}, this run "
            f"with {config.model.convention}"
        )

    def choose(path: Any, mine: jax.Array) -> jax.Array:
        name = _name(path)
        given = found.get(name)
        if name == table and (given is None or given.shape[1:] == mine.shape[1:]):
            return _copy_rows(mine, given, rows) if given is not None else mine
        if given is not None and given.shape == mine.shape:
            return given
        if name.startswith(f"{LORA}/"):
            return mine
        shape = "none" if given is None else given.shape
        raise ConfigError(
            f"{option} {source} has {shape} for parameter {name}; this model needs {mine.shape}"
        )

    return jax.tree_util.tree_map_with_path(choose, fresh)


def _copy_rows(mine: jax.Array, given: jax.Array, rows: Sequence[tuple[int, int]]) -> jax.Array:
    to, of = np.array(rows, np.int32).reshape(-1, 2).T
    copy = jax.jit(lambda mine, given: mine.at[to].set(given[of]), out_shardings=mine.sharding)
    return copy(mine, given)


def _warn_of_another_process(config: Config, theirs: Config) -> None:
    """One line that names the options of the process in which another run's weights were trained otherwise."""
    here, there = dataclasses.asdict(config.diffusion), dataclasses.asdict(theirs.diffusion)
    if here["kind"] != there["kind"]:
        here = {"kind": here["kind"]}
    different = [
        f"--diffusion.{name.replace('_', '-')} {value} (there {there[name]})"
        for name, value in here.items()
        if value != there[name] and not (name == "sigma" and here["learn_sigma"])
    ]
    if different:
        say(f"warning: those weights were trained for another process than {', '.join(different)}")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
