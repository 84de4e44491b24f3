"""Steps that hang, and steps of which a trace is written."""

import threading

import pytest
from started import finish, start

from dit_jax import signals
from dit_jax.config import ConfigError, to_json
from dit_jax.config.check import profiled_steps
from dit_jax.training import profile
from dit_jax.training import watchdog as room
from dit_jax.training.loop import train

LONG = 60.0  # seconds that a test waits for what comes at once


@pytest.fixture
def ended(monkeypatch):
    """Set, with code and line, when the watchdog would end the process."""
    happened, said = threading.Event(), []

    def end(*what):
        said.append(what)
        happened.set()

    monkeypatch.setattr(signals, "end", end)
    monkeypatch.setattr(room.faulthandler, "dump_traceback", lambda *_, **__: said.append("stacks"))
    return happened, said


def test_a_step_that_does_not_come_ends_the_process(ended):
    happened, said = ended
    with room.Watchdog(1e-4) as watchdog:
        watchdog.step(7)
        assert happened.wait(LONG)
    stacks, (code, line) = said
    assert stacks == "stacks" and code == 75
    assert line.startswith("process 0 of 1: no step after step 7 for 0.0001 minutes (--train.stall-minutes)")


def test_what_is_no_step_does_not_count(ended):
    """Neither the time before the first step, nor what a pause holds; time counts on after it."""
    happened, _ = ended
    with room.Watchdog(1e-4) as watchdog:
        assert not happened.wait(0.2)
        with watchdog.paused():
            assert not happened.wait(0.2)
        assert not happened.wait(0.2)
        watchdog.step(1)
        assert happened.wait(LONG)


def test_steps_that_come_in_time_and_no_limit(ended):
    happened, _ = ended
    for minutes in (1000.0, 0.0):
        with room.Watchdog(minutes) as watchdog:
            for step in range(100):
                watchdog.step(step)
    assert not happened.wait(0.2)


def test_a_run_that_hangs(ended, tiny, latents, tmp_path, monkeypatch):
    """Its data stop after two steps; the watchdog lets them come on once it has seen it."""
    happened, said = ended
    from dit_jax.training import loop

    batches = loop.batches

    def stopping(*args, **options):
        for number, batch in enumerate(batches(*args, **options)):
            if number == 2:
                assert happened.wait(LONG)
            yield batch

    monkeypatch.setattr(loop, "batches", stopping)
    options = {"workdir": str(tmp_path / "run"), "steps": 4, "stall_minutes": 0.02}
    train(tiny.config(train=options, data={"dir": str(latents)}))
    assert "no step after step 2 for 0.02 minutes" in said[1][1]


PROGRAM = """
import sys
from dit_jax.config import load
from dit_jax.training.loop import train
train(load(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_trace_is_written(tiny, latents, tmp_path):
    """In a process of its own: where another test has loaded the TPU compiler, the profiler would look for TPUs."""
    options = {"workdir": str(tmp_path / "run"), "steps": 4, "profile_steps": "2:3"}
    file = tmp_path / "config.json"
    file.write_text(to_json(tiny.config(train=options, data={"dir": str(latents)})))
    finish(start("-c", PROGRAM, file))
    assert len(list((tmp_path / "run" / profile.FOLDER).rglob("*.xplane.pb"))) == 1


def test_steps_to_be_traced():
    assert profiled_steps("") == range(0) and profiled_steps("20:23") == range(20, 24)
    for text in ("20", "20:", "5:4", "0:3", "a:b", "-1:2"):
        with pytest.raises(
            ConfigError, match=r"--train.profile-steps is .*; expected the first and the last step"
        ):
            profiled_steps(text)
