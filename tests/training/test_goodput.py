"""Where a run's time goes: every second is of one kind, also over many starts and when clocks jump."""

import itertools
import json
import time

import jax
import numpy as np
import pytest

from dit_jax.runs.log import read_lines
from dit_jax.training import goodput as room
from dit_jax.training.goodput import Goodput
from dit_jax.training.loop import train


class Clock:
    """Two clocks that a test sets; the wall clock may be wrong by `off`."""

    def __init__(self):
        self.now, self.off = 1000.0, 0.0

    def __call__(self):
        return self.now

    def wall(self):
        return 5e8 + self.now + self.off

    def start(self, folder):
        """A process of the run."""
        clock = Goodput(folder, self, self.wall)
        clock.carry()
        return clock


def steps(clock, goodput, first, last, seconds, lines=None):
    """Steps of so many seconds, with a line of the log after each."""
    for step in range(first, last + 1):
        clock.now += seconds
        goodput.note(step)
        if lines is not None:
            lines.append({"step": step} | goodput.line())


def test_every_second_is_of_one_kind(tmp_path):
    clock = Clock()
    goodput = clock.start(tmp_path)
    clock.now += 3
    with goodput.spent_on("restore"):
        clock.now += 2
    goodput.go_on(0, [])
    with goodput.spent_on("data"):
        clock.now += 1
    clock.now += 10
    goodput.switch("step")
    clock.now += 20
    with goodput.spent_on("save"):
        clock.now += 4
    line = goodput.line()
    expected = {"start": 3, "restore": 2, "data": 1, "compile": 10, "step": 20, "save": 4}
    assert goodput.seconds == dict.fromkeys(room.KINDS, 0) | expected
    assert line["time_total"] == 40 and line["goodput"] == 0.5
    assert sum(v for k, v in line.items() if k != "time_total") == pytest.approx(1)
    assert str(goodput) == (
        "goodput 50.0% of 40 s: compile 25.0%, data 2.5%, save 10.0%, restore 5.0%, start 7.5%"
    )


def test_ten_starts_have_one_goodput_that_adds_up_to_the_wall_time(tmp_path):
    """Each of ten processes is killed 5 steps after the checkpoint that the next one goes on from."""
    clock, begin, lines = Clock(), 1000.0, []
    for start in range(10):
        goodput = Goodput(tmp_path, clock, clock.wall)
        clock.now += 2
        goodput.carry()
        lines = [line for line in lines if line["step"] <= 10 * start] if start % 2 else lines
        goodput.go_on(10 * start, lines)
        lines = [line for line in lines if line["step"] <= 10 * start]
        clock.now += 7
        goodput.switch("step")
        steps(clock, goodput, 10 * start + 1, 10 * start + 15, 60.0, lines)
        assert sum(goodput.seconds.values()) == 0 or goodput.line()["time_total"] == clock.now - begin
        clock.now += 100
    goodput.switch("step")  # the last process was not killed: what came after its last step is its own
    found = goodput.seconds
    assert sum(found.values()) == pytest.approx(clock.now - begin)
    assert found["start"] == 20 and found["compile"] == 70 and found["down"] == 900
    assert found["lost"] == pytest.approx(9 * 5 * 60)
    assert found["step"] == pytest.approx(105 * 60 + 100)


def test_what_is_lost_lies_between_two_lines(tmp_path):
    clock = Clock()
    goodput = clock.start(tmp_path)
    goodput.go_on(0, [])
    goodput.switch("step")
    steps(clock, goodput, 1, 10, 60.0)
    lines = [{"step": 10} | goodput.line()]
    steps(clock, goodput, 11, 14, 120.0)
    goodput = clock.start(tmp_path)
    goodput.go_on(12, lines)
    assert goodput.seconds["step"] == 840 and goodput.seconds["lost"] == 240
    goodput.go_on(5, lines)  # the next one finds that damaged
    assert goodput.seconds["step"] == pytest.approx(300) and goodput.seconds["lost"] == pytest.approx(780)


def test_a_wall_clock_that_jumps_takes_nothing_away(tmp_path):
    clock = Clock()
    goodput = clock.start(tmp_path)
    goodput.go_on(0, [])
    goodput.switch("step")
    clock.off = -86400.0
    steps(clock, goodput, 1, 10, 60.0)
    assert goodput.seconds["step"] == 600
    clock.off -= 86400.0
    goodput = clock.start(tmp_path)
    assert sum(goodput.seconds.values()) == 600 and goodput.seconds["down"] == 0


@pytest.mark.parametrize("text", ["", "[]", "{", '{"step": 1}', '{"step": 1, "time": "x", "seconds": []}'])
def test_a_note_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / room.FILE).write_text(text)
    assert sum(Clock().start(tmp_path).seconds.values()) == 0


@pytest.mark.slow
def test_a_run_says_its_goodput_and_does_not_mind_clocks_that_jump(
    tiny, latents, tmp_path, monkeypatch, capsys
):
    """By two hours, back and on in turn, at each look, and on by days between two starts: saves are not given up."""

    def run(steps, name="run"):
        options = {"workdir": str(tmp_path / name), "steps": steps, "log_every": 1}
        return train(tiny.config(train=options, data={"dir": str(latents)}))

    def log(name):
        return read_lines(tmp_path / name / "metrics.jsonl")

    whole = run(4, "whole")
    real, looks, began = time.time, itertools.count(), time.monotonic()
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * (-1) ** next(looks))
    run(2)
    monkeypatch.setattr(time, "time", lambda: real() + 2 * 86400)
    parts = run(4)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), parts, whole)
    assert [line["loss"] for line in log("run")] == [line["loss"] for line in log("whole")]

    seconds = json.loads((tmp_path / "run" / room.FILE).read_text())["seconds"]
    assert seconds["down"] >= 86400 and sum(seconds.values()) - seconds["down"] <= time.monotonic() - began
    assert all(seconds[kind] > 0 for kind in ("step", "compile", "data", "save", "restore", "start"))
    assert seconds["lost"] == seconds["samples"] == 0
    for line in log("run"):
        shares = [v for k, v in line.items() if k.startswith("time_") and k != "time_total"]
        assert line["goodput"] + sum(shares) == pytest.approx(1)
    totals = [line["time_total"] for line in log("run")]
    assert totals == sorted(totals)
    said = capsys.readouterr().err
    assert (
        said.count("goodput ") == 3 and "could not be written" not in said and "going on from step 2" in said
    )
