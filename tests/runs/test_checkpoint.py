"""Which checkpoints stay, and what a disk that is really full costs: a small tmpfs, a state without a network."""

import json
import pathlib
import shutil

import pytest
import states
from started import together
from states import META, made_up_state

from dit_jax.runs.checkpoint import CheckpointError, Checkpoints, find_damage, steps_to_keep


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
import pathlib, resource, shutil, sys
import jax
index, address, folder, support = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), sys.argv[4]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, index)
sys.path.insert(0, support)
from states import META, made_up_state
from dit_jax.runs.checkpoint import CheckpointError, Checkpoints
largest = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
commit = Checkpoints._write_checksums
def no_room_at_3(self):
    if self._saving == 3:
        raise OSError(28, "No space left on device")
    commit(self)
Checkpoints._write_checksums = no_room_at_3  # in process 0, when all is written
with Checkpoints(folder, keep=12) as checkpoints:
    for step in range(1, 9):
        checkpoints.settle()
        if index == 1:  # at step 2 it alone finds no room
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000 if step == 2 else largest, largest))
        if step == 7 and index == 0:
            shutil.rmtree(folder / "1")
        checkpoints.save(made_up_state(step, 260), META, 1.0)
    checkpoints.settle()
    print(checkpoints.steps())
    try:
        checkpoints.wait()
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.slow
def test_processes_agree_on_a_failed_save(small_disk):
    folder = small_disk(4) / "checkpoints"

    def arguments(address, index):
        shutil.rmtree(folder, ignore_errors=True)  # also of a start that came to nothing
        return "-c", PROCESS, index, address, folder, pathlib.Path(states.__file__).parent

    outputs = [(process.out, process.err) for process in together(arguments)]
    # 2: process 1 alone; 3: process 0 at the end; 6: the disk is full; 7 takes the room of 1.
    assert [output.splitlines()[-2] for output, _ in outputs] == ["[4, 5, 7]"] * 2
    assert all("step 8 could not be written" in output.splitlines()[-1] for output, _ in outputs)
    assert names(folder) == ["4", "5", "7"]
    said = [line for line in outputs[0][1].splitlines() if "Gloo" not in line]
    assert [line.partition(" could")[0] for line in said] == [
        f"checkpoint of step {step}" for step in (2, 3, 6, 8)
    ]
    assert not [line for line in outputs[1][1].splitlines() if "Gloo" not in line]
