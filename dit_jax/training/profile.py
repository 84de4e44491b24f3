"""Steps that are looked at closely."""

from __future__ import annotations

import pathlib
from typing import Self

import jax

FOLDER = "profile"  # in a run's folder


class Profile:
    """A trace of some steps, for XProf or TensorBoard, in the run's folder; each process writes its own."""

    def __init__(self, steps: range, workdir: pathlib.Path) -> None:
        self._steps, self._folder, self._runs = steps, workdir / FOLDER, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """The step `step` is about to be asked for."""
        if step in self._steps and not self._runs:
            jax.profiler.start_trace(str(self._folder))
            self._runs = True

    def after(self, step: int, result: object) -> None:
        """It has been asked for; the trace ends when the last one's result is there."""
        if self._runs and step >= self._steps[-1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._runs:
            jax.profiler.stop_trace()
            self._runs = False
