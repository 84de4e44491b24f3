"""Steps that are looked at closely."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Self

import jax

from dit_jax import paths

FOLDER = "profile"  # in a run's folder


class Profile:
    """A trace of some steps, for XProf or TensorBoard, in the run's folder; each process writes its own."""

    def __init__(self, steps: range, workdir: pathlib.Path) -> None:
        self._steps, self._folder, self._runs = steps, workdir / FOLDER, False
        self._here: tempfile.TemporaryDirectory[str] | None = None  # where it is written, for a bucket

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """The step `step` is about to be asked for."""
        if step in self._steps and not self._runs:
            self._runs = True
            if paths.is_remote(self._folder):
                self._here = tempfile.TemporaryDirectory(prefix="dit_jax-")
            jax.profiler.start_trace(self._here.name if self._here else str(self._folder))

    def after(self, step: int, result: object) -> None:
        """It has been asked for; the trace ends when the last one's result is there."""
        if self._runs and step >= self._steps[-1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._runs:
            jax.profiler.stop_trace()
            self._runs = False
            if self._here:
                with self._here as here:
                    for name, file in paths.files_below(pathlib.Path(here)).items():
                        paths.upload(file, self._folder / name)
