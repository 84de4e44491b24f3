"""The log of a run: workdir/metrics.jsonl, one JSON object per line, and TensorBoard events beside it."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import jax

from dit_jax import flops
from dit_jax.config import Config
from dit_jax.training.checkpoint import say

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter


class MetricsLog:
    """Writes lines of metrics; only process 0 touches the disk.

    Where that fails (a full disk, say), training goes on: the lines wait for room, TensorBoard's events of that
    time are lost, and this is said once until a line finds room again.
    """

    def __init__(self, workdir: pathlib.Path, step: int) -> None:
        """Open the log of a run that goes on after `step`: later lines, of steps now lost, are dropped."""
        self._file = None
        if jax.process_index() != 0:
            return
        truncate(workdir / "metrics.jsonl", step)
        self._file = (workdir / "metrics.jsonl").open("ab", buffering=0)
        self._waiting = b""
        self._failing = False
        self._folder = workdir / "tensorboard"
        self._purge_step = step + 1 if step else None
        self._events: EventsWriter | None = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, on disk when this returns if there is room."""
        if self._file is None:
            return
        self._waiting += json.dumps({"step": step, **metrics}).encode() + b"\n"
        problem = self._flush() or self._write_events(step, metrics)
        if problem and not self._failing:
            say(f"the metrics of step {step} could not be written ({problem}); they wait for room")
        self._failing = problem is not None

    def _flush(self) -> OSError | None:
        """Write what waits; the error that kept a part of it back."""
        assert self._file is not None
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            return error
        return None

    def _write_events(self, step: int, metrics: Mapping[str, float]) -> OSError | None:
        """The same for TensorBoard; the error that kept it back.

        Written from here: tensorboardX's SummaryWriter has a thread that dies of a full disk.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        events = [Event(step=step, summary=scalar(*pair), wall_time=time.time()) for pair in metrics.items()]
        if self._purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            events.insert(0, Event(step=self._purge_step, session_log=start, wall_time=time.time()))
        try:
            if self._events is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._events = EventsWriter(str(self._folder / "events"), f".{step}")
            for event in events:
                self._events.write_event(event)
            self._events.flush()
        except OSError as error:
            self._events = None  # half an event may be written: the next one begins a new file
            for file in self._folder.glob("events*"):
                if file.stat().st_size == 0:
                    file.unlink()
            return error
        self._purge_step = None
        return None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        problem = self._flush()
        if problem:
            say(f"{self._waiting.count(10)} lines of metrics.jsonl are lost ({problem})")
        with contextlib.suppress(OSError):  # said already
            self._file.close()
            if self._events is not None:
                self._events.close()


def read_lines(path: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; one cut short by a crash is left out, and what is no line of metrics."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [found for line in lines if (found := _metrics(line)) is not None]


def _metrics(line: bytes) -> dict[str, float] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def truncate(path: pathlib.Path, step: int) -> None:
    """Cut off the lines after `step`, and a last one that is cut short. Takes no room: the disk may be full."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        kept = 0
        for line in file:
            found = _metrics(line)
            if (found is not None and found["step"] > step) or not line.endswith(b"\n"):
                break
            kept += len(line)
        file.truncate(kept)


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
