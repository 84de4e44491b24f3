"""Processes that are gone without a word end the others within a minute, and it is said who they are."""

import os
import signal
import threading
import time

import pytest
from started import together, wait_for

from dit_jax import liveness

LONG = 60.0  # seconds that a test waits for what comes at once

PROGRAM = """
import sys
import jax, numpy as np
from jax.experimental import multihost_utils
from dit_jax import processes
from dit_jax.files import whole_file
from dit_jax.training import launch

address, index, file = sys.argv[1:]
args = ["--coordinator", address, "--num-processes", "2", "--process-index", index]
launch.initialize(launch.parse_launch(args)[0])
try:
    multihost_utils.process_allgather(np.zeros(4))
    with whole_file(file):
        print("up", flush=True)
        while True:
            multihost_utils.process_allgather(np.zeros(4))
except Exception as error:
    processes.outlive(error)
    sys.exit(processes.end(1, "failed"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_is_killed_ends_the_other_within_a_minute(who, tmp_path):
    def arguments(address, index):
        return "-c", PROGRAM, address, index, tmp_path / str(index)

    since = []

    def kill(*processes):
        for process in processes:
            wait_for(lambda process=process: "up" in process.out, process)
        processes[who].kill()
        since.append(time.monotonic())

    codes = [75, 75]
    codes[who] = -signal.SIGKILL
    said = together(arguments, code=codes, meanwhile=kill)[1 - who].err
    seconds = time.monotonic() - since[-1]
    print(f"process {who} of 2 was killed; the other ended after {seconds:.1f} s")
    assert seconds <= 60
    assert said.count(f"process {who} of 2 is gone") == 1 and said.endswith("goes on from what is saved\n")
    assert "failed" not in said
    assert not [name for name in os.listdir(tmp_path) if name.startswith(f".{1 - who}.")]


def test_jax_aborts_nobody_before_it_is_known_who_is_gone():
    """It hears of a process twice in its time: half of that may be over when the process is killed."""
    assert liveness.JAX_SECONDS / 2 > liveness.PATIENCE_SECONDS + 10


class Store:
    """A store of keys in memory; `answers` says whether it does."""

    def __init__(self):
        self.keys, self.answers = {}, True

    def key_value_set(self, key, value, allow_overwrite):
        if not self.answers:
            raise ConnectionError
        self.keys[key] = value

    def key_value_dir_get(self, key):
        found = [(name, value) for name, value in self.keys.items() if name.startswith(key)]
        if not found:
            raise KeyError(key)
        return found


def test_who_says_nothing_new_is_gone():
    roll = liveness.RollCall(4)

    def said(number):
        return [("alive/1", str(number)), ("alive/3", "7")]

    for number in range(liveness.LOOKS):
        assert roll.look(said(number)) == ([2] if number == liveness.LOOKS - 1 else [])
    assert roll.look(said("x")) == [2, 3]  # a look later: its first word was news
    assert roll.look([("alive/1", "y"), ("alive/2", "1"), ("alive/3", "8")]) == []


def test_a_pause_of_one_look_less_is_forgiven():
    roll = liveness.RollCall(2)
    for number in range(3):
        for _ in range(liveness.LOOKS):
            assert roll.look([("alive/1", str(number))]) == []


def test_all_are_there_until_one_is_silent(monkeypatch):
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.01)
    store, happened, said = Store(), threading.Event(), []

    def end(*what):
        said.append(what)
        happened.set()

    lead, other = (liveness.Presence(store, index, 2, end) for index in range(2))
    other.start()
    while "dit_jax/alive/1" not in store.keys:
        time.sleep(0.001)
    lead.start()
    other.stop()
    assert happened.wait(LONG)
    lead.stop()
    assert said[0][0] == [1] and said[0][1].startswith("process 1 of 2 is gone: nothing has been heard of it")


def test_a_store_that_does_not_answer_ends_the_process_that_asks(monkeypatch):
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.01)
    happened, said = threading.Event(), []

    def end_alone(line):
        said.append(line)
        happened.set()

    monkeypatch.setattr(liveness, "_end_alone", end_alone)
    store = Store()
    other = liveness.Presence(store, 1, 2, pytest.fail)
    other.start()
    while "dit_jax/alive/1" not in store.keys:
        time.sleep(0.001)
    assert not said
    store.answers = False
    assert happened.wait(LONG)
    other.stop()
    assert said[0].startswith("process 0 of 2 is gone")
