"""Orbax's manager of saves for disks that can fill up: a save that fails costs itself, and nothing after it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import pathlib
import re
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dit_jax import buckets, paths

# Orbax narrates every save, and asyncio what a failed one has left undone; their errors are raised too.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def orbax_path(path: pathlib.Path) -> epath.Path:
    """A path as Orbax takes it."""
    _ignore_closed_loops()
    if paths.is_remote(path):
        _let_orbax_use_buckets()
    return epath.Path(paths.absolute(path))


@functools.cache
def _let_orbax_use_buckets() -> None:
    """Orbax knows Google's buckets as such, and takes Amazon's for folders. TensorStore, which does the work, knows
    both: what Orbax does for the ones is right for the others. It gives up in minutes, not in half an hour."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    normalize = tensorstore_utils._normalize_path
    gcs_utils._GCS_PATH_PREFIX = buckets.SCHEMES
    gcs_utils.get_kvstore_for_gcs = buckets.kvstore
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(buckets.SCHEMES)
    tensorstore_utils._normalize_path = lambda path: normalize(path).replace("s3:/", "s3://")


@contextlib.contextmanager
def told_of_store(folder: pathlib.Path) -> Iterator[None]:
    """What TensorStore says of a store that fails, a ValueError of several lines, as a BucketError in a sentence."""
    try:
        yield
    except ValueError as error:
        if not paths.is_remote(folder) or not re.match(r"[A-Z_]{5,}: ", str(error)):
            raise
        said = " ".join(str(error).split())[:300]
        raise buckets.BucketError(f"{folder}: the store refuses or does not answer ({said})") from None


@functools.cache
def _keep_time() -> None:
    """Orbax takes a save that has lasted 20 minutes for one that hangs, by the wall clock: one that is set ahead
    would cost the checkpoint that is being written."""
    from orbax.checkpoint._src.futures import future, signaling_client

    steady: Any = types.SimpleNamespace(**vars(time) | {"time": time.monotonic})
    future.time = signaling_client.time = steady


class Saver:
    """Writes numbered folders in the background, each whole or not at all; all processes agree on which.

    A failed save is reported once, by `settle`. Its files are removed, and the next one begins afresh: the
    manager that failed would raise old errors for a new save.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        item_names: Sequence[str],
        policy: Any = None,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        """`policy` says what is kept (None: all); `before_commit` runs on process 0 when all files are written."""
        _keep_time()
        self.directory = directory.absolute()
        self._names = tuple(item_names)
        self._meeting = Meeting() if jax.process_count() > 1 else None
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=before_commit, barrier_sync_fn=self._meeting
            ),
        )
        self._failure: Exception | None = None
        self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            orbax_path(self.directory), options=self._options, item_names=self._names
        )

    def start(self, step: int, args: ocp.args.Composite) -> None:
        """Start writing `step` in the background; no other save may be in progress (`settle`)."""
        if self._meeting is not None:
            self._meeting.begin()
        try:
            self.manager.save(step, args=args, force=True)
        except Exception as error:
            if self._meeting is not None:  # the other processes are inside of it
                raise
            self._failure = error

    def settle(self) -> Exception | None:
        """Return when no save is in progress: what went wrong with the last one, the same for all processes."""
        failure, self._failure = self._failure, None
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            failure = error
        if self._meeting is not None:
            failed = np.flatnonzero(multihost_utils.process_allgather(np.bool_(failure is not None)))
            if failed.size and failure is None:
                failure = OSError(f"process {failed[0]} failed")
        if failure is not None:
            self._discard()
            self.manager = self._open()
        return failure

    def reopen(self) -> None:
        """Look at the folder anew, after something else has changed it."""
        self.manager.close()
        self.manager = self._open()

    def close(self) -> None:
        """Stop, in this process alone; `settle` before it tells how the last save ended."""
        try:
            self.manager.close()
        except Exception:
            self._discard()

    def _discard(self) -> None:
        """Close the manager, whatever it still has to say, and remove what a failed save has left.

        Writes that the save gave up go on for a moment and make its folders anew.
        """
        for _ in range(3):  # it stops at each error that it holds
            with contextlib.suppress(Exception):
                self.manager.close()
        end, clean = time.monotonic() + 10, 0
        while jax.process_index() == 0 and clean < 4 and time.monotonic() < end:
            left = [name for name in paths.names_in(self.directory) if ".orbax-checkpoint-tmp" in name]
            for name in left:
                paths.remove(self.directory / name)
            clean = 0 if left else clean + 1
            time.sleep(0.05)


class Meeting:
    """Where the processes of a save wait for each other. One that has failed says so: nobody waits for it.

    Orbax's own barriers would wait 20 minutes. It calls this one when a process's files are written, when
    process 0 has committed them, and at the end of a save, also of one that has failed.
    """

    _count = itertools.count()
    _places = ("async_write_complete", "async_commit_complete")

    def __init__(self) -> None:
        from jax._src import distributed  # the only way to its store of keys and values

        self._store: Any = distributed.global_state.client
        self._save = ""

    def begin(self) -> None:
        """A new save; called by all processes when the last one has ended in all of them."""
        if self._save and jax.process_index() == 0:
            self._store.key_value_delete(self._save)
        self._save = f"dit_jax/save/{next(Meeting._count)}/"
        self._ahead = list(self._places)

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Return when all processes are here; raises OSError where one has failed on its way."""
        error = sys.exception()
        place = next((place for place in self._places if place in key), None)
        if place is not None:
            self._ahead.remove(place)
            problem = self._meet(place, timeout_ms)
            if problem:
                raise OSError(problem)
        elif error is not None:  # the end of a failed save, after which there is nothing to wait for
            for place in self._ahead:
                self._say(place, f"{error}" or repr(error))
            self._ahead.clear()

    def _say(self, place: str, problem: str) -> None:
        me = jax.process_index()
        self._store.key_value_set(f"{self._save}{place}/{'all' if me == 0 else me}", problem or "-")

    def _meet(self, place: str, timeout_ms: int) -> str:
        def read(who: object) -> str:
            said = self._store.blocking_key_value_get(f"{self._save}{place}/{who}", timeout_ms)
            return "" if said == "-" else said

        if jax.process_index() != 0:
            self._say(place, "")
            return read("all")
        problem = next(filter(None, map(read, range(1, jax.process_count()))), "")
        self._say(place, problem)
        return problem


@functools.cache
def _ignore_closed_loops() -> None:
    """Keep what a failed save or restore gave up from printing, file by file, that nobody waits for it any more."""
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, RuntimeError) or "Event loop is closed" not in str(
            unraisable.exc_value
        ):
            report(unraisable)

    sys.unraisablehook = hook
