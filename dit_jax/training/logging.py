"""The log of a run: workdir/metrics.jsonl, one JSON object per line, and TensorBoard events beside it."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping

import jax


class MetricsLog:
    """Writes lines of metrics; only process 0 touches the disk."""

    def __init__(self, workdir: pathlib.Path, step: int) -> None:
        """Open the log of a run that goes on after `step`: later lines, of steps now lost, are dropped."""
        self._file = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        truncate(path, step)
        self._file = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, on disk when this returns."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """Close both files."""
        if self._file is not None:
            self._file.close()
            self._events.close()


def read_lines(path: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; one cut short by a crash is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def truncate(path: pathlib.Path, step: int) -> None:
    """Drop the lines after `step`, atomically."""
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
