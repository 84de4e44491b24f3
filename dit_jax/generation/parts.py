"""What has been made of samples until all are there: a folder of whole files, from which a command goes on.

Every file holds arrays of samples START to STOP - 1, and is named by these. Processes share the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dit_jax import leases, paths, signals
from dit_jax.buckets import BucketError
from dit_jax.config import ConfigError
from dit_jax.config.saved import shown
from dit_jax.files import whole_file, write_whole
from dit_jax.processes import on_lead
from dit_jax.runs.checkpoint import say

RECIPE, LOCK = "recipe.json", ".lock"


def parts_of(path: paths.Named) -> pathlib.Path:
    """The folder of what is to become the file `path`."""
    return paths.to_path(f"{path}.parts")


def held_bytes(folder: pathlib.Path) -> int:
    """Bytes of the parts that lie there, on a disk: a bucket is never full."""
    if paths.is_remote(folder) or not os.path.isdir(folder):
        return 0
    return sum(file.stat().st_size for file in folder.glob("*.npz"))


def _lost(why: str) -> None:
    """Another process fills the folder from now on: this one must not go on with it."""
    signals.remove_unfinished()
    signals.end(1, why)


class Parts:
    """The parts of `count` samples that `recipe` decides, a value that JSON can say under each option's name.

    All processes make one, for the same folder. Raises ConfigError, naming `option`, where the folder holds samples
    of another recipe, or another process is at work in it.
    """

    def __init__(
        self, option: str, folder: pathlib.Path, recipe: Mapping[str, Any], count: int, anew: bool = False
    ) -> None:
        """anew: what the folder held is dropped."""
        self.folder, self.count = folder, count
        self._held = contextlib.ExitStack()

        def open_folder() -> list[tuple[int, int]]:
            if anew:
                paths.remove(folder)
            if not paths.is_remote(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as held:
                self._lock(option, held)
                self._check(option, json.loads(json.dumps(recipe)))
                self._drop_damaged()
                self._held = held.pop_all()
            return self._missing()

        self.missing = [(start, stop) for start, stop in on_lead(open_folder)]
        """(start, stop) of the runs of samples that are not there yet, in order, as the folder was found."""

    def put(self, start: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays (b, ...) of samples start to start + b - 1. Raises OSError, naming the folder."""
        stop = start + len(next(iter(arrays.values())))
        try:
            with whole_file(self._file(start, stop)) as beside, beside.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
        except OSError as error:
            raise OSError(
                f"{self.folder} cannot be written to ({error.strerror or error}); what lies there stays, "
                "and the same command goes on with it"
            ) from error

    def read(self, first: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of one part after the other, in the order of samples: of all, or of the first ones."""
        at, end = 0, self.count if first is None else min(first, self.count)
        for start, stop in self._there():
            if start >= end:
                break
            if start > at:
                break
            # Parts overlap where a command went on with batches of another size.
            yield {name: array[at - start : end - start] for name, array in self._load(start, stop).items()}
            at = min(stop, end)
        if at < end:
            raise FileNotFoundError(f"{self.folder} has no samples {at} and on; expected {end}")

    def _load(self, start: int, stop: int) -> dict[str, np.ndarray]:
        file = self._file(start, stop)
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as found:
                return dict(found)
        except BucketError:
            raise
        except Exception as error:  # readers of damaged files raise nearly anything
            raise ConfigError(
                f"{file} cannot be read ({error}); expected it as it was written: remove it, and the same command "
                "draws its samples again"
            ) from None

    def _file(self, start: int, stop: int) -> pathlib.Path:
        return self.folder / f"{start:010d}-{stop:010d}.npz"

    def _drop_damaged(self) -> None:
        """Take away parts that are cut off, so that they are made again. Only their lists of contents are read.

        In a bucket a part is whole or not there.
        """
        if paths.is_remote(self.folder):
            return
        for start, stop in self._there():
            file = self._file(start, stop)
            try:
                with file.open("rb") as opened, np.load(opened, allow_pickle=False):
                    pass
            except Exception as error:
                say(f"warning: {file} cannot be read ({error}); its samples are drawn again")
                file.unlink()

    def clear(self) -> None:
        """Take the parts away, by process 0: a result that was made of them stands in their place."""
        for start, stop in self._there():
            paths.remove(self._file(start, stop))

    def remove(self) -> None:
        """Take the folder away, by process 0: all of it is in the file that it was for."""
        if not paths.is_remote(self.folder):
            paths.remove(self.folder)
            return
        files = paths.files_below(self.folder)
        locks = {name for name in files if name.startswith(f"{LOCK}.")}
        for name in files.keys() - locks:
            paths.remove(files[name])
        self._held.close()  # a lock that is held would be written again
        for name in locks:
            paths.remove(files[name])

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _lock(self, option: str, held: contextlib.ExitStack) -> None:
        lock, taken = self.folder / LOCK, False
        if paths.is_remote(lock):
            try:
                held.enter_context(leases.leased(lock, _lost))
            except leases.HeldError:
                taken = True
        else:
            file = held.enter_context(lock.open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # a file system without locks is left alone
                taken = error.errno in (errno.EAGAIN, errno.EACCES)
        if taken:
            raise ConfigError(
                f"{option}: another command is filling {self.folder}; expected it to have ended, or another file"
            )

    def _check(self, option: str, recipe: Mapping[str, Any]) -> None:
        """Raises ConfigError where samples of another recipe lie here."""
        file = self.folder / RECIPE
        if any(not name.startswith(".") and name != RECIPE for name in paths.names_in(self.folder)):
            try:
                saved = json.loads(paths.read_bytes(file))
                other = next((name for name in recipe if saved.get(name) != recipe[name]), None)
            except BucketError:
                raise
            except (OSError, ValueError, AttributeError):
                raise ConfigError(
                    f"{option}: {file} cannot be read; expected it as an earlier command left it, or no such folder"
                ) from None
            if other is not None:
                raise ConfigError(
                    f"{option}: {self.folder} holds samples with {other} {shown(saved.get(other))}, not "
                    f"{shown(recipe[other])}; expected the same command, which goes on with them, or no such folder"
                )
        else:
            write_whole(file, json.dumps(recipe, indent=1) + "\n")

    def _there(self) -> list[tuple[int, int]]:
        """(start, stop) of the parts, in order."""
        names = (re.fullmatch(r"(\d{10})-(\d{10})\.npz", name) for name in paths.names_in(self.folder))
        return sorted((int(name[1]), int(name[2])) for name in names if name)

    def _missing(self) -> list[tuple[int, int]]:
        at, missing = 0, []
        for start, stop in self._there():
            if start > at:
                missing.append((at, start))
            at = max(at, stop)
        return [*missing, (at, self.count)] if at < self.count else missing
