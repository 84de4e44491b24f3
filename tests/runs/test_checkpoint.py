"""Which checkpoints stay, and what a disk that is really full costs: a small tmpfs, a state without a network."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.runs.checkpoint import CheckpointError, Checkpoints, find_damage, steps_to_keep
from dit_jax.runs.state import TrainState

META = {"config": {}, "dataset": "d"}


def made_up_state(step, kilobytes=1):
    """A state whose arrays are split over all devices of all processes, 4 * kilobytes in all."""
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def put(x, spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    rng = np.random.default_rng(step)
    size = (8, 16 * kilobytes)
    params = {f"w{i}": put(rng.normal(size=size).astype(np.float32), PartitionSpec("data")) for i in range(2)}
    zero = put(np.zeros((), np.int32), PartitionSpec())
    return TrainState(
        step=put(np.asarray(step, np.int32), PartitionSpec()), params=params, opt_state={"m": params},
        ema=(params, params), skipped=zero, bad_streak=zero, data_offset=zero, totals={"loss": zero},
    )  # fmt: skip


def save(directory, losses, **options):
    """Checkpoints with these losses by step, saved by one process from its start to its end."""
    with Checkpoints(directory, **options) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(made_up_state(step), META, loss)


def names(directory):
    return sorted((p.name for p in directory.iterdir()), key=lambda name: (len(name), name))


def test_which_steps_are_kept():
    steps, losses = [1, 2, 3, 4, 5, 6], {1: 5.0, 2: 0.5, 4: 0.5, 6: 3.0}
    assert steps_to_keep(steps, losses, 1, 0) == {4, 6}
    assert steps_to_keep(steps, {}, 2, 0) == {5, 6}
    assert steps_to_keep(steps, losses, 1, 3) == {3, 4, 6}
    assert steps_to_keep([], losses, 2, 3) == set()


def test_the_best_is_remembered_by_later_starts(tmp_path):
    save(tmp_path, {1: 3.0, 2: 0.5, 3: 2.0}, keep=2)
    save(tmp_path, {4: 1.0, 5: None}, keep=2)  # a checkpoint inside of a window of the log has no loss
    assert names(tmp_path) == ["2", "4", "5"]
    save(tmp_path, {6: 0.25, 7: 1.0, 8: 1.0}, keep=2)
    assert names(tmp_path) == ["6", "7", "8"]


def test_checkpoints_without_a_readable_loss_are_not_the_best_and_go(tmp_path):
    save(tmp_path, {1: 3.0, 2: 0.5, 3: 2.0, 4: 1.0}, keep=4)
    for step, text in ((1, "[]"), (2, "{\xff"), (3, json.dumps(META))):  # the last as older versions wrote it
        (tmp_path / str(step) / "meta" / "metadata").write_text(text)
    save(tmp_path, {5: 4.0}, keep=1)
    assert names(tmp_path) == ["4", "5"]


def test_a_disk_that_fills_up_costs_the_saves_that_find_no_room(tmp_path, small_disk, capfd):
    folder = small_disk(4) / "checkpoints"
    states = {step: made_up_state(step, kilobytes=260) for step in range(1, 9)}  # three of them have room
    with Checkpoints(folder, keep=12) as checkpoints:
        for step, state in states.items():
            checkpoints.save(state, META, 1.0)
            if step == 5:
                checkpoints.settle()
                assert names(folder) == ["1", "2", "3"]  # nothing of what failed
                shutil.rmtree(folder / "1")
        checkpoints.settle()
        assert checkpoints.steps() == [2, 3, 6]
        with pytest.raises(CheckpointError, match=r"step 8 could not be written: .*No space left"):
            checkpoints.wait()
    assert names(folder) == ["2", "3", "6"]
    assert all(find_damage(folder / step) == "" for step in names(folder))
    said = [line for line in capfd.readouterr().err.splitlines() if line]
    assert [line.partition(" could")[0] for line in said] == [
        f"checkpoint of step {step}" for step in (4, 5, 7, 8)
    ]


PROCESS = """
import importlib.util, pathlib, resource, shutil, sys
import jax
index, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
spec = importlib.util.spec_from_file_location("made_up", sys.argv[4])
made_up = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made_up)
largest = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
commit = made_up.Checkpoints._write_checksums
def no_room_at_3(self):
    if self._saving == 3:
        raise OSError(28, "No space left on device")
    commit(self)
made_up.Checkpoints._write_checksums = no_room_at_3  # in process 0, when all is written
with made_up.Checkpoints(folder, keep=12) as checkpoints:
    for step in range(1, 9):
        checkpoints.settle()
        if index == 1:  # at step 2 it alone finds no room
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000 if step == 2 else largest, largest))
        if step == 7 and index == 0:
            shutil.rmtree(folder / "1")
        checkpoints.save(made_up.made_up_state(step, 260), made_up.META, 1.0)
    checkpoints.settle()
    print(checkpoints.steps())
    try:
        checkpoints.wait()
    except made_up.CheckpointError as error:
        print(error)
"""


@pytest.mark.slow
def test_processes_agree_on_a_failed_save(small_disk):
    folder = small_disk(4) / "checkpoints"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    root = pathlib.Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), port, str(folder), __file__],
            env=env, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], outputs
    # 2: process 1 alone; 3: process 0 at the end; 6: the disk is full; 7 takes the room of 1.
    assert [output.splitlines()[-2] for output, _ in outputs] == ["[4, 5, 7]"] * 2
    assert all("step 8 could not be written" in output.splitlines()[-1] for output, _ in outputs)
    assert names(folder) == ["4", "5", "7"]
    said = [line for line in outputs[0][1].splitlines() if "Gloo" not in line]
    assert [line.partition(" could")[0] for line in said] == [
        f"checkpoint of step {step}" for step in (2, 3, 6, 8)
    ]
    assert not [line for line in outputs[1][1].splitlines() if "Gloo" not in line]
