"""Steps that hang."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from typing import Self

import jax

from dit_jax import signals


class Watchdog:
    """Ends a process whose next step does not come. (A process that is gone: `dit_jax.liveness`)

    It says on stderr where every thread is, and ends with code 75, after which a scheduler starts the command again.
    Only time outside of `paused` counts, from the first `step` on, when compilation is over.
    """

    def __init__(self, minutes: float) -> None:
        """minutes: the longest that a step may take; 0: any time."""
        self._seconds = 60 * minutes
        self._changed = threading.Condition()
        self._since: float | None = None
        self._step, self._closed = 0, False

    def __enter__(self) -> Self:
        if self._seconds:
            threading.Thread(target=self._look, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def step(self, number: int) -> None:
        """A step has been asked for, and those before it are done."""
        self._set(number, time.monotonic())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count: saving and drawing take what they take."""
        watched = self._since is not None
        self._set(self._step, None)
        try:
            yield
        finally:
            self._set(self._step, time.monotonic() if watched else None)

    def _set(self, step: int, since: float | None) -> None:
        with self._changed:
            self._step, self._since = step, since
            self._changed.notify()

    def _look(self) -> None:
        with self._changed:
            while not self._closed:
                if self._since is None:
                    self._changed.wait()
                    continue
                left = self._since + self._seconds - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if self._closed:
                return
            step = self._step
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        signals.end(
            signals.EXIT_STOPPED,
            f"process {jax.process_index()} of {jax.process_count()}: no step after step {step} for "
            f"{self._seconds / 60:g} minutes (--train.stall-minutes); the same command goes on from what is saved",
        )
