"""The log of a run: workdir/metrics.jsonl, one JSON object per line, and TensorBoard events beside it."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping

import jax

from dit_jax import flops
from dit_jax.config import Config
from dit_jax.files import write_whole
from dit_jax.training.checkpoint import say


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
        self._events: SummaryWriter | None = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1 if step else None
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, on disk when this returns; where that fails (a full disk, say), training goes on.

        The line is then tried again with the next one. TensorBoard gets no more events: its writer would block.
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            say(f"the metrics of step {step} could not be written ({error}); training goes on")
        if self._events is None:
            return
        try:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        except OSError as error:
            say(
                f"TensorBoard events of step {step} could not be written ({error}); this process writes no more"
            )
            self._events = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
            if self._events is not None:
                self._events.close()
        except OSError as error:
            say(f"the log could not be closed ({error})")


def read_lines(path: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; one cut short by a crash is left out."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def truncate(path: pathlib.Path, step: int) -> None:
    """Drop the lines after `step`, atomically."""
    if path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


class Throughput:
    """Images per second and the share of the devices' peak, over the time between lines of the log."""

    def __init__(self, config: Config, num_devices: int) -> None:
        self._batch_size = config.train.batch_size
        self._flops_per_image = flops.train_flops_per_image(config)
        peak = flops.peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * num_devices if peak else None
        self._since: float | None = None
        self._step = 0

    @property
    def started(self) -> bool:
        """Whether a lap is running."""
        return self._since is not None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - start

    def lap(self, step: int) -> dict[str, float]:
        """Rates since the last call; {} at the first."""
        now, rates = time.perf_counter(), {}
        if self._since is not None:
            rate = (step - self._step) * self._batch_size / (now - self._since)
            rates["images_per_second"] = rate
            if self._peak:
                rates["mfu"] = rate * self._flops_per_image / self._peak
        self._since, self._step = now, step
        return rates
