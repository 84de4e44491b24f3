"""What the time of a run goes into, from its first start on: goodput is the share spent in steps that count.

Every second belongs to one kind, so that all kinds add up to the wall time. WORKDIR/goodput.json carries them from
one start of the run to the next.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from dit_jax.files import write_whole

KINDS = {
    "step": "steps that count",
    "compile": "up to the first step's result, at every start; the step of another size of latents",
    "data": "waiting for the next batch",
    "save": "what a save keeps the next step from",
    "samples": "drawing and measuring",
    "restore": "reading the state",
    "start": "data, checks, tracing",
    "lost": "steps that are done again",
    "down": "between the last note of a process and the next process",
}
FILE = "goodput.json"
NOTE_SECONDS = 30.0  # between notes: so much of a process that is killed counts as down


class Goodput:
    """A stopwatch that always runs for one kind. Within a process it does not follow jumps of the wall clock."""

    def __init__(
        self,
        workdir: pathlib.Path,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] | None = None,
    ) -> None:
        self._file, self._clock, self._wall = workdir / FILE, clock, wall or time.time
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since, self._noted = "start", clock(), clock()
        self._step = 0  # reached, perhaps by a process before this one

    def carry(self) -> None:
        """Go on from the note of the process before, if there is one that can be read."""
        try:
            saved = json.loads(self._file.read_text())
            seconds = {kind: max(0.0, float(saved["seconds"].get(kind, 0.0))) for kind in KINDS}
            step, noted = int(saved["step"]), float(saved["time"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        self.switch(self._kind)
        here = sum(self.seconds.values())
        for kind, before in seconds.items():
            self.seconds[kind] += before
        self.seconds["down"] += max(0.0, self._wall() - here - noted)
        self._step = step

    def go_on(self, step: int, lines: Sequence[Mapping[str, float]]) -> None:
        """The run goes on after `step`: the steps that it had got further are lost. `lines` are those of its log."""
        self.switch("compile")
        points = {0: 0.0} | {
            int(line["step"]): line["goodput"] * line["time_total"] for line in lines if "goodput" in line
        }
        points = {at: seconds for at, seconds in points.items() if at < self._step}
        points[self._step] = self.seconds["step"]
        kept = float(np.interp(step, list(points), list(points.values())))
        lost = max(0.0, self.seconds["step"] - kept)
        self.seconds["step"] -= lost
        self.seconds["lost"] += lost
        self.note(step, always=True)

    def switch(self, kind: str) -> None:
        """From now on time is of this kind."""
        now = self._clock()
        self.seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    @contextlib.contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """The time of the block is of this kind."""
        before = self._kind
        self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def note(self, step: int, *, always: bool = False) -> None:
        """Write down, by process 0, how far the run has got, if the last note is some time ago."""
        self._step = step
        if jax.process_index() != 0 or (self._clock() - self._noted < NOTE_SECONDS and not always):
            return
        self.switch(self._kind)
        self._noted = self._since
        saved = {"step": step, "time": self._wall(), "seconds": self.seconds}
        with contextlib.suppress(OSError):  # a full disk: the next note may find room
            write_whole(self._file, json.dumps(saved))

    def line(self) -> dict[str, float]:
        """For the log: seconds in all, and the share of each kind in them."""
        self.switch(self._kind)
        total = sum(self.seconds.values())
        shares = {f"time_{kind}": spent / total for kind, spent in self.seconds.items()} if total else {}
        return {"goodput": shares.pop("time_step", 0.0), "time_total": total} | shares

    def __str__(self) -> str:
        shares = self.line()
        kinds = [f"{kind} {share:.1%}" for kind in KINDS if (share := shares.get(f"time_{kind}", 0)) >= 5e-4]
        parts = f": {', '.join(kinds)}" if kinds else ""
        return f"goodput {shares['goodput']:.1%} of {shares['time_total']:.0f} s{parts}"
