"""Checkpoints of a run: written in the background by Orbax, atomically, and checked before they are trusted.

    workdir/checkpoints/STEP/{params,ema,rest}/   arrays (OCDBT), readable one by one
                            /meta/                 JSON: config, dataset fingerprint and loss
                            /checksums.json        SHA-256 of every file, committed with them

In a bucket, where nothing is renamed, a checkpoint counts from when it has Orbax's commit_success.txt, and the list
holds the checksums that the store keeps: nothing is read back for it. Nothing in checkpoints is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep_policy

from dit_jax import paths
from dit_jax.config import ConfigError
from dit_jax.processes import on_lead
from dit_jax.runs.saving import Saver, told_of_store
from dit_jax.runs.state import TrainState

CHECKSUMS = "checksums.json"
ARRAYS = ("params", "ema", "rest")
HASHERS = min(8, os.cpu_count() or 1)  # threads


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
        self.directory = directory.absolute()
        self._saving: int | None = None
        self._failure: Exception | None = None  # of the last save, until `wait` tells it
        policy = _Kept(keep, milestone_every, {})
        self._saver = Saver(self.directory, (*ARRAYS, "meta"), policy, self._write_checksums)
        self._losses = policy.losses
        self._losses |= {step: loss for step in self.steps() if (loss := self._loss_of(step)) is not None}

    def _loss_of(self, step: int) -> float | None:
        """The loss that a checkpoint was saved with; None where there is none, or its file is damaged."""
        try:
            meta = json.loads(paths.read_bytes(self.directory / str(step) / "meta" / "metadata"))
        except (OSError, ValueError):
            return None
        loss = meta.get("loss") if isinstance(meta, dict) else None
        return loss if isinstance(loss, float) else None

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(self._saver.manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any], loss: float | None) -> None:
        """Start writing `state` in the background, unless its step is there already.

        `loss` is the mean over the window of the log that ends here, None where none does: such a checkpoint is
        never the best. A failure to write this one (a full disk, say) is reported by the next call, and training
        goes on: older checkpoints stay. `wait` raises it.
        """
        step = int(state.step)
        if step in self._saver.manager.all_steps():
            return
        self.settle()
        self._saving, self._failure = step, None
        self._losses.pop(step, None)  # of one that was set aside
        if loss is not None:
            self._losses[step] = loss
        arrays = {name: ocp.args.StandardSave(item) for name, item in _groups(state).items()}
        self._saver.start(step, ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta | {"loss": loss})))

    def settle(self) -> None:
        """Return when no save is in progress; a failure is reported."""
        failure = self._saver.settle()
        if failure is not None:
            self._failure = failure
            say(f"checkpoint of step {self._saving} could not be written ({failure}); the older ones stay")

    def wait(self) -> None:
        """Return when the last save is on disk; raises CheckpointError when it could not be written."""
        failure, self._failure = self._saver.settle() or self._failure, None
        if failure is not None:
            raise CheckpointError(f"checkpoint of step {self._saving} could not be written: {failure}")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the save in progress; raises CheckpointError when that fails, unless something else already did."""
        try:
            if kind is None:  # else the other processes may be elsewhere
                self.wait()
        finally:
            self._saver.close()

    def restore(
        self, like: TrainState, check: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> TrainState | None:
        """The newest readable state, laid out like `like` (shapes with shardings); None where there is none.

        A damaged checkpoint is set aside, said so, and the one before it is tried. `check` receives the
        checkpoint's meta and raises for one of another run. What fails with whole files (too little memory, say)
        is no damage: it is raised, and the checkpoint stays.
        """
        for step in reversed(self.steps()):
            problem = shared_damage(self.directory / str(step))
            if problem:
                self._set_aside(step, problem)
                continue
            check(self._read(step, meta=ocp.args.JsonRestore())["meta"])
            return self._restore_arrays(step, like)
        if any(name.startswith("damaged-") for name in paths.names_in(self.directory)):
            raise CheckpointError(f"no readable checkpoint is left in {self.directory}; every one is damaged")
        return None

    def _restore_arrays(self, step: int, like: TrainState) -> TrainState:
        items = {name: ocp.args.StandardRestore(item) for name, item in _groups(like).items()}
        found = self._read(step, **items)
        return TrainState(params=found["params"], ema=found["ema"], **found["rest"])

    def _read(self, step: int, **items: Any) -> Any:
        with told_of_store(self.directory):
            return self._saver.manager.restore(step, args=ocp.args.Composite(**items))

    # -------------------------------------------------------------------------------------- integrity

    def _write_checksums(self) -> None:
        """Runs on process 0 in Orbax's background thread when all files are written, before they are committed
        under the step's name: the list of checksums is part of the atomic commit."""
        # 12.orbax-checkpoint-tmp, or 12 in a bucket; never 120
        names = paths.names_in(self.directory)
        (folder,) = (self.directory / name for name in names if name.partition(".")[0] == str(self._saving))
        (folder / CHECKSUMS).write_text(json.dumps(file_checksums(folder), indent=1))

    def _set_aside(self, step: int, problem: str) -> None:
        say(f"checkpoint of step {step} is damaged ({problem}); going back to the one before it")

        def rename() -> None:
            aside = self.directory / f"damaged-{step}"
            while aside.exists():
                aside = aside.with_name(aside.name + "x")
            paths.move(self.directory / str(step), aside)

        on_lead(rename)
        self._saver.reopen()


@dataclasses.dataclass(frozen=True)
class _Kept(keep_policy.PreservationPolicy):
    """`steps_to_keep` as Orbax asks for it. Its own policy of the best forgets the losses at every start."""

    keep: int
    milestone_every: int
    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        kept = steps_to_keep(steps, self.losses, self.keep, self.milestone_every)
        return [step in kept for step in steps]


def steps_to_keep(
    steps: Sequence[int], losses: Mapping[int, float], keep: int, milestone_every: int
) -> set[int]:
    """Of these steps the newest `keep`, the one with the lowest loss (the last of equals), and the milestones."""
    kept = set(sorted(steps)[-keep:])
    known = [step for step in sorted(steps, reverse=True) if step in losses]
    if known:
        kept.add(min(known, key=lambda step: losses[step]))
    if milestone_every:
        kept |= {step for step in steps if step % milestone_every == 0}
    return kept


def file_checksums(folder: pathlib.Path, item: str = "") -> dict[str, str]:
    """SHA-256 of every file below a checkpoint's folder, or below that of one item, by relative path; in a bucket the
    store's own checksum.

    Left out are the list itself and Orbax's note of its times, which it completes after the list is made.
    """
    left_out = (CHECKSUMS, "_CHECKPOINT_METADATA")
    if paths.is_remote(folder):
        found = paths.checksums_below(folder / item if item else folder)
        start = f"{item}/" if item else ""
        return {start + name: said for name, said in found.items() if name.rpartition("/")[2] not in left_out}
    files = {
        name: file for name, file in paths.files_below(folder / item).items() if file.name not in left_out
    }
    with futures.ThreadPoolExecutor(HASHERS) as pool:  # hashing leaves the interpreter to others
        digests = pool.map(_sha256, files.values())
        return {
            file.relative_to(folder).as_posix(): digest
            for file, digest in zip(files.values(), digests, strict=True)
        }


def _sha256(file: pathlib.Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def find_damage(folder: pathlib.Path, item: str = "") -> str:
    """The first file, of one item or of all, that is missing or differs from the list of checksums; "" for none."""
    listing = folder / CHECKSUMS
    if not listing.is_file():
        return f"{listing} is missing"
    try:
        expected = json.loads(listing.read_text())
    except ValueError:
        return f"{listing} is not JSON"
    if not isinstance(expected, dict):
        return f"{listing} holds {str(expected)[:40]}, where an object of checksums is expected"
    expected = {name: digest for name, digest in expected.items() if name.startswith(item and f"{item}/")}
    if not expected:
        return f"{listing} names no file" + (f" of {item}" if item else "")
    found = file_checksums(folder, item)
    for name, digest in expected.items():
        if name not in found:
            return f"{folder / name} is missing"
        if found[name] != digest:
            return f"{folder / name} differs from its checksum"
    return ""


def shared_damage(folder: pathlib.Path, item: str = "") -> str:
    """What is wrong with the files of a checkpoint ("" for nothing): process 0 reads them, all get the answer."""

    def look() -> str:
        try:
            return find_damage(folder, item)
        except OSError as error:
            return f"cannot be read: {error}"

    return on_lead(look)
