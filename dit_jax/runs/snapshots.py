"""Snapshots of the power-function averages, and the average of any width made from them after training.

    python -m dit_jax.runs.snapshots --workdir runs/digits --sigma-rel 0.075 --out runs/digits-0.075

writes a folder that sample.py takes like any other run's.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tqdm

from dit_jax import paths
from dit_jax.config import Config, ConfigError, run_config, to_json
from dit_jax.files import check_folder
from dit_jax.runs import averages
from dit_jax.runs.checkpoint import CheckpointError, say
from dit_jax.runs.saving import Saver, orbax_path
from dit_jax.runs.state import TrainState
from dit_jax.runs.weights import save_weights

ITEMS = ("averages", "meta")


class Snapshots:
    """Writes workdir/snapshots/STEP: {"averages": one tree per width} and {"meta": widths, updates so far}."""

    def __init__(self, workdir: pathlib.Path, config: Config, step: int) -> None:
        """Of a run that goes on after `step`: later snapshots are dropped, they will be written again."""
        self._widths = config.optim.ema_sigma_rel
        self._every = config.train.snapshot_every if self._widths else 0
        self._saver: Saver | None = None
        self._saving = 0
        if self._every:
            self._saver = Saver(workdir / "snapshots", ITEMS)
            for later in [s for s in self._saver.manager.all_steps() if s > step]:
                self._saver.manager.delete(later)

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._saver is not None:
            if kind is None:  # else the other processes may be elsewhere
                self._settle()
            self._saver.close()

    def save(self, state: TrainState, step: int) -> None:
        """Start writing a snapshot in the background, if one is due; where that fails, training goes on."""
        if self._saver is None or step % self._every:
            return
        self._settle()
        self._saving = step
        args = ocp.args.Composite(
            averages=ocp.args.StandardSave(state.ema[-len(self._widths) :]),
            meta=ocp.args.JsonSave({"sigma_rel": self._widths, "updates": int(state.step - state.skipped)}),
        )
        self._saver.start(step, args)

    def _settle(self) -> None:
        failure = self._saver.settle() if self._saver is not None else None
        if failure is not None:
            say(f"snapshot of step {self._saving} could not be written ({failure})")


def reconstruct(workdir: pathlib.Path, sigma_rel: float, step: int | None = None) -> tuple[Any, int]:
    """(the power-function average of width sigma_rel, the step it ends at), on the host in float32.

    The average is taken over training up to `step` (default: the newest snapshot), from all snapshots up to it.
    Raises ConfigError without snapshots, for an unknown step or a width that they cannot give.
    """
    steps = []
    if (workdir / "snapshots").is_dir():
        options = ocp.CheckpointManagerOptions(create=False, read_only=True)
        folder = orbax_path(workdir / "snapshots")
        manager = ocp.CheckpointManager(folder, options=options, item_names=ITEMS)
        steps = sorted(manager.all_steps())
    if not steps:
        raise CheckpointError(
            f"{workdir} has no snapshots; expected a run with --optim.ema-sigma-rel and --train.snapshot-every"
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ConfigError(f"--step is {step}; {workdir} has snapshots of {', '.join(map(str, steps))}")
    if not 0 < sigma_rel < 0.28:
        raise ConfigError(f"--sigma-rel is {sigma_rel}; expected a width above 0 and below 0.28")

    steps = [s for s in steps if s <= step]
    metas = [manager.restore(s, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"] for s in steps]
    times = [meta["updates"] for meta in metas for _ in meta["sigma_rel"]]
    gammas = [averages.sigma_rel_to_gamma(width) for meta in metas for width in meta["sigma_rel"]]
    coefficients = iter(
        averages.combination(times, gammas, metas[-1]["updates"], averages.sigma_rel_to_gamma(sigma_rel))
    )
    total: Any = None
    for s in tqdm.tqdm(steps, unit="snapshot"):
        for average in _read(workdir, s):
            c = next(coefficients)
            part = jax.tree.map(lambda leaf, c=c: c * np.asarray(leaf, np.float64), average)
            total = part if total is None else jax.tree.map(np.add, total, part)
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), total), step


def _read(workdir: pathlib.Path, step: int) -> list[Any]:
    """The averages of one snapshot, as NumPy arrays, whatever devices wrote them."""
    folder = orbax_path(workdir / "snapshots" / str(step) / "averages")
    with ocp.StandardCheckpointer() as reader:
        shapes = reader.metadata(folder).item_metadata.tree
        return list(
            reader.restore(folder, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes))
        )


@dataclass(frozen=True)
class SnapshotArgs:
    """Make the power-function average of any width from a run's snapshots (EDM2, arXiv 2312.02696)."""

    workdir: str
    """Folder of the run."""
    sigma_rel: float
    """Width of the average, relative to the length of training."""
    out: str
    """Folder to write, to be sampled from like a run's."""
    step: int | None = None
    """Step at which the average ends (default: the newest snapshot)."""


def main(args: SnapshotArgs) -> None:
    """Reconstruct, and write the folder."""
    workdir, out = paths.to_path(args.workdir), paths.to_path(args.out)
    if out.exists():
        raise ConfigError(f"--out is {out}, which exists; expected a new folder")
    config = run_config("--workdir", workdir)
    if not (workdir / "dataset.json").is_file():
        raise ConfigError(
            f"--workdir is {workdir}, which has no dataset.json; expected the folder of a trained run"
        )
    check_folder("--out", out.parent)
    params, step = reconstruct(workdir, args.sigma_rel, args.step)
    optim = dataclasses.replace(config.optim, ema_more=(), ema_sigma_rel=())
    save_weights(out / "checkpoints", step, params)
    paths.copy(workdir / "dataset.json", out / "dataset.json")
    (out / "config.json").write_text(to_json(dataclasses.replace(config, optim=optim)))
    print(json.dumps({"sigma_rel": args.sigma_rel, "step": step, "out": str(out)}))


def run_command() -> int:
    """The command; exit code 2: a bad option or folder, 130: interrupted by Ctrl-C."""
    import tyro

    try:
        main(tyro.cli(SnapshotArgs, prog="snapshots"))
    except ConfigError as error:
        print(f"snapshots: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("snapshots: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_command())
