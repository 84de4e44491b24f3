"""Checkpoints of a run: written in the background by Orbax, atomically, and checked before they are trusted.

    workdir/checkpoints/STEP/{params,ema,rest}/   arrays (OCDBT), readable one by one
                            /meta/                 JSON: config and dataset fingerprint
                            /checksums.json        SHA-256 of every file, committed with them

Nothing in them is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep_policy

from dit_jax.config import ConfigError
from dit_jax.training.state import TrainState

CHECKSUMS = "checksums.json"
ARRAYS = ("params", "ema", "rest")

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates every save; its errors are raised too


class CheckpointError(ConfigError):
    """A checkpoint is missing, damaged or does not belong to this run."""


def say(message: str) -> None:
    """One line on stderr, from process 0 alone."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)


def _groups(state: TrainState) -> dict[str, Any]:
    """The state as the three items of a checkpoint."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {"params": fields.pop("params"), "ema": fields.pop("ema"), "rest": fields}


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, the best by loss, and any milestones."""

    def __init__(self, directory: pathlib.Path, keep: int, milestone_every: int = 0) -> None:
        policies: list[Any] = [
            keep_policy.LatestN(keep),
            keep_policy.BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=1),
        ]
        if milestone_every:
            policies.append(keep_policy.EveryNSteps(milestone_every))
        self.directory = directory.absolute()
        self._saving: int | None = None
        self._failure: Exception | None = None  # of the last save, where it did not even start
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=keep_policy.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.directory, options=self._options, item_names=(*ARRAYS, "meta"))

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any], loss: float) -> bool:
        """Start writing `state` in the background; false if this step is there already.

        A failure to write the previous one or this one (a full disk, say) is reported and training goes on:
        older checkpoints stay. `wait` raises it.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return False
        arrays = {name: ocp.args.StandardSave(item) for name, item in _groups(state).items()}
        self.settle()
        self._saving, self._failure = step, None
        try:
            args = ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta))
            return self._manager.save(step, args=args, metrics={"loss": loss}, force=True)
        except OSError as error:
            self._failure = error
            self._report(error)
            return False

    def settle(self) -> None:
        """Return when no save is in progress; a failure is reported."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        say(f"checkpoint of step {self._saving} could not be written ({error}); the older ones stay")
        self._remove_unfinished()
        self._manager.reload()

    def _remove_unfinished(self) -> None:
        """Give the room that a failed save has taken back: the disk may be full of it."""
        if jax.process_index() == 0:
            for folder in self.directory.glob(f"{self._saving}.*"):
                shutil.rmtree(folder, ignore_errors=True)

    def wait(self) -> None:
        """Return when the last save is on disk; raises CheckpointError when it could not be written."""
        try:
            self._manager.wait_until_finished()
            if self._failure is not None:
                raise self._failure
        except Exception as error:
            self._remove_unfinished()
            raise CheckpointError(
                f"checkpoint of step {self._saving} could not be written: {error}"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the save in progress; raises CheckpointError when that fails, unless something else already did."""
        try:
            self.wait()
        except CheckpointError:
            if kind is None:
                raise
        finally:
            self._manager.close()

    def restore(
        self, like: TrainState, check: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> TrainState | None:
        """The newest readable state, laid out like `like` (shapes with shardings); None where there is none.

        A damaged checkpoint is set aside, said so, and the one before it is tried. `check` receives the
        checkpoint's meta and raises for one of another run. What fails with whole files (too little memory, say)
        is no damage: it is raised, and the checkpoint stays.
        """
        for step in reversed(self.steps()):
            problem = self._problem(step)
            if problem:
                self._set_aside(step, problem)
                continue
            check(self._read(step, meta=ocp.args.JsonRestore())["meta"])
            return self._restore_arrays(step, like)
        if any(self.directory.glob("damaged-*")):
            raise CheckpointError(f"no readable checkpoint is left in {self.directory}; every one is damaged")
        return None

    def _restore_arrays(self, step: int, like: TrainState) -> TrainState:
        items = {name: ocp.args.StandardRestore(item) for name, item in _groups(like).items()}
        found = self._read(step, **items)
        return TrainState(params=found["params"], ema=found["ema"], **found["rest"])

    def _read(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    # -------------------------------------------------------------------------------------- integrity

    def _write_checksums(self) -> None:
        """Runs on process 0 in Orbax's background thread when all files are written, before they are committed
        under the step's name: the list of checksums is part of the atomic commit."""
        # 12.orbax-checkpoint-tmp, or 12 on object stores; never 120
        (folder,) = (p for p in self.directory.iterdir() if p.name.partition(".")[0] == str(self._saving))
        (folder / CHECKSUMS).write_text(json.dumps(file_checksums(folder), indent=1))

    def _problem(self, step: int) -> str:
        """What is wrong with the files of a checkpoint ("" if nothing); all processes get the same answer."""
        problem = ""
        if jax.process_index() == 0:
            try:
                problem = find_damage(self.directory / str(step))
            except OSError as error:
                problem = f"cannot be read: {error}"
        if jax.process_count() > 1:
            bad = int(multihost_utils.broadcast_one_to_all(bool(problem)))
            problem = problem or ("found damaged by process 0" if bad else "")
        return problem

    def _set_aside(self, step: int, problem: str) -> None:
        say(f"checkpoint of step {step} is damaged ({problem}); going back to the one before it")
        self._manager.close()
        if jax.process_index() == 0:
            aside = self.directory / f"damaged-{step}"
            while aside.exists():
                aside = aside.with_name(aside.name + "x")
            os.rename(self.directory / str(step), aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside a damaged checkpoint")
        self._manager = self._open()


def file_checksums(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file below a checkpoint's folder, by relative path.

    Left out are the list itself and Orbax's note of its times, which it completes after the list is made.
    """
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in (CHECKSUMS, "_CHECKPOINT_METADATA"):
            with file.open("rb") as data:
                found[file.relative_to(folder).as_posix()] = hashlib.file_digest(data, "sha256").hexdigest()
    return found


def find_damage(folder: pathlib.Path) -> str:
    """The first file that is missing or differs from the list of checksums; "" for none."""
    listing = folder / CHECKSUMS
    if not listing.is_file():
        return f"{listing} is missing"
    try:
        expected = json.loads(listing.read_text())
    except ValueError:
        return f"{listing} is not JSON"
    found = file_checksums(folder)
    for name, digest in expected.items():
        if name not in found:
            return f"{folder / name} is missing"
        if found[name] != digest:
            return f"{folder / name} differs from its checksum"
    return ""
