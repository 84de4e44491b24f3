"""What goes wrong in long runs: damaged files, updates that are not finite, a full disk. No run is lost."""

import contextlib
import pathlib
import pickle
import shutil

import jax
import numpy as np
import pytest

from dit_jax.config import ConfigError
from dit_jax.runs.checkpoint import CheckpointError, Checkpoints, find_damage
from dit_jax.runs.log import MetricsLog, read_lines
from dit_jax.training import loop
from dit_jax.training.launch import TrainingDivergedError
from dit_jax.training.loop import train


@pytest.fixture
def config(tiny, latents, tmp_path):
    """A function that makes the config of a run in tmp_path; keywords replace options of `train`."""

    def make(name="run", data=None, **options):
        options = {"log_every": 1, "checkpoint_every": 2, "workdir": str(tmp_path / name)} | options
        return tiny.config(train=options, data={"dir": str(latents)} | (data or {}))

    return make


def same_bits(a, b):
    """Every leaf of two trees is equal to the bit."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def six_steps(tiny, latents, tmp_path_factory):
    """(folder of a run with checkpoints of steps 2, 4 and 6, its last state)."""
    folder = tmp_path_factory.mktemp("six") / "run"
    options = {"workdir": str(folder), "steps": 6, "log_every": 1, "checkpoint_every": 2}
    return folder, train(tiny.config(train=options, data={"dir": str(latents)}))


def largest_file(folder):
    """The file with the most bytes: arrays."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGES = {
    "truncated": lambda folder: largest_file(folder).write_bytes(largest_file(folder).read_bytes()[:-100]),
    "flipped bit": lambda folder: flip_a_bit(largest_file(folder)),
    "missing file": lambda folder: largest_file(folder).unlink(),
    "missing item": lambda folder: shutil.rmtree(folder / "rest"),
    "missing meta": lambda folder: shutil.rmtree(folder / "meta"),
    "missing list": lambda folder: (folder / "checksums.json").unlink(),
    "empty folder": lambda folder: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in folder.iterdir()],
    "orbax's note": lambda folder: (folder / "_CHECKPOINT_METADATA").write_bytes(b"{\xff"),
    "missing note": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(six_steps, config, tmp_path, capsys, damage):
    folder, whole = six_steps
    shutil.copytree(folder, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    DAMAGES[damage](checkpoints / "6")
    same_bits(train(config(steps=6)), whole)
    said = capsys.readouterr().err
    if "note" not in damage:  # nothing that a run needs
        assert "checkpoint of step 6 is damaged" in said
        assert "going back to the one before it" in said
        assert (checkpoints / "damaged-6").is_dir()
    assert find_damage(checkpoints / "6") == ""
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_run_never_starts_over_silently(six_steps, config, tmp_path):
    shutil.copytree(six_steps[0], tmp_path / "run")
    for step in (2, 4, 6):
        flip_a_bit(largest_file(tmp_path / "run" / "checkpoints" / str(step)))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="every one is damaged"):
            train(config(steps=6))


@pytest.mark.parametrize("damage", ["orbax's note", "missing note", "missing item", "empty folder"])
def test_leftovers_of_a_killed_deletion_are_ignored(six_steps, config, tmp_path, capsys, damage):
    shutil.copytree(six_steps[0], tmp_path / "run")
    DAMAGES[damage](tmp_path / "run" / "checkpoints" / "2")
    state = train(config(steps=8))
    assert int(state.step) == 8
    assert "damaged" not in capsys.readouterr().err
    assert {6, 8} <= set(Checkpoints(tmp_path / "run" / "checkpoints", 9).steps())


def test_leftovers_of_a_killed_save_are_ignored(six_steps, config, tmp_path):
    folder, whole = six_steps
    shutil.copytree(folder, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "6", checkpoints / "6.orbax-checkpoint-tmp")
    shutil.rmtree(checkpoints / "6")
    shutil.rmtree(checkpoints / "6.orbax-checkpoint-tmp" / "params")
    same_bits(train(config(steps=6)), whole)
    assert not list(checkpoints.glob("*tmp*"))


def test_nothing_is_unpickled(six_steps, config, tmp_path, monkeypatch):
    folder, _ = six_steps
    shutil.copytree(folder, tmp_path / "run")

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    state = train(config(steps=7))
    assert int(state.step) == 7


def poison(monkeypatch, bad_steps):
    """Make the data of these steps (counted by the data, not by the updates) not a number."""
    batches = loop.batches

    def poisoned(dataset, batch_size, seed, start_step, *args):
        for step, batch in enumerate(batches(dataset, batch_size, seed, start_step, *args), start=start_step):
            yield batch | {"moments": batch["moments"] * np.float16("nan")} if step in bad_steps else batch

    monkeypatch.setattr(loop, "batches", poisoned)


def lines_of(config):
    return read_lines(pathlib.Path(config.train.workdir) / "metrics.jsonl")


def test_a_bad_batch_is_skipped_counted_and_logged(config, monkeypatch):
    poison(monkeypatch, {3})
    c = config(steps=6)
    state = train(c)
    assert (int(state.step), int(state.skipped), int(state.bad_streak)) == (6, 1, 0)
    lines = lines_of(c)
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 0, 0]
    assert ["loss" in line for line in lines] == [
        True,
        True,
        True,
        False,
        True,
        True,
    ]  # not 0.0: there is none
    assert all(np.isfinite(value) for line in lines for value in line.values())
    # No checkpoint of step 4, whose update was left out.
    assert Checkpoints(pathlib.Path(c.train.workdir) / "checkpoints", 9).steps() == [2, 6]


def test_a_window_without_an_update_is_not_the_best(config, monkeypatch):
    poison(monkeypatch, {2, 3})  # the second window of the log; the checkpoint of step 5 ends none
    c = config(steps=15, log_every=2, checkpoint_every=5, keep=1)
    train(c)
    assert Checkpoints(pathlib.Path(c.train.workdir) / "checkpoints", 9).steps() == [10, 15]


def test_many_bad_updates_go_back_and_on_with_other_data(config, monkeypatch, capsys):
    poison(monkeypatch, {4, 5, 6, 7})  # after four good ones, until the run has gone past them
    c = config(steps=8, bad_steps=3)
    state = train(c)
    assert "the last 3 updates up to step 7 were not finite: going back to step 4" in capsys.readouterr().err
    # Back at step 4 with the data of step 7; one of the bad ones is left and is skipped.
    assert (int(state.step), int(state.data_offset), int(state.skipped)) == (8, 3, 1)
    assert [line["step"] for line in lines_of(c)] == [1, 2, 3, 4, 5, 6, 7, 8]
    resumed = train(config(steps=8, bad_steps=3))
    same_bits(resumed, state)


def test_a_failed_save_is_no_obstacle_to_going_back(config, monkeypatch, capsys):
    poison(monkeypatch, {4, 5})
    write = Checkpoints._write_checksums

    def full_at_4(self):
        if self._saving == 4:
            raise OSError(28, "No space left on device")
        write(self)

    monkeypatch.setattr(Checkpoints, "_write_checksums", full_at_4)
    assert int(train(config(steps=8, bad_steps=2)).step) == 8
    assert "up to step 6 were not finite: going back to step 2" in capsys.readouterr().err


def test_divergence_stops_with_the_reason(config, monkeypatch, capsys):
    poison(monkeypatch, set(range(3, 100)))
    with pytest.raises(
        TrainingDivergedError, match=r"diverged at step 4.*after 2 returns to the last checkpoint"
    ):
        train(config(steps=20, bad_steps=2, max_rollbacks=2))
    assert capsys.readouterr().err.count("going back") == 2  # and not once more, for nothing


def test_a_damaged_shard_is_named(config, latents, tmp_path):
    copy = tmp_path / "latents"
    shutil.copytree(latents, copy)
    shard = sorted(copy.glob("*.array_record-*"))[1]
    flip_a_bit(shard)
    with pytest.raises(ConfigError, match=shard.name):
        train(config(steps=6, data={"dir": str(copy)}))


def test_a_failed_save_costs_no_older_checkpoint(six_steps, config, tmp_path, monkeypatch, capsys):
    folder, _ = six_steps
    shutil.copytree(folder, tmp_path / "run")

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_write_checksums", full)
    with pytest.raises(CheckpointError, match=r"step 12 could not be written: .*No space left"):
        train(config(steps=12))
    assert "checkpoint of step 8 could not be written" in capsys.readouterr().err  # training went on
    monkeypatch.undo()
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))  # the room is given back
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 9)
    assert checkpoints.steps() == [2, 4, 6]
    assert all(find_damage(checkpoints.directory / str(step)) == "" for step in checkpoints.steps())
    state = train(config(steps=12))
    same_bits(state, train(config("whole", steps=12)))


def test_a_last_save_that_fails_at_once_ends_with_an_error(six_steps, config, tmp_path, monkeypatch, capsys):
    shutil.copytree(six_steps[0], tmp_path / "run")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(CheckpointError, match=r"step 9 could not be written: .*No space left"):
        train(config(steps=9))
    assert "checkpoint of step 8 could not be written" in capsys.readouterr().err  # training went on


def fill(folder):
    """Take all the room of a file system; gives the file that holds it."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while out.write(bytes(4096)):
            pass
    return file


def test_a_full_disk_stops_no_log(small_disk, capfd):
    folder = small_disk(1)
    with MetricsLog(folder, 0) as log:
        log.write(1, {"loss": 1.0})
        filler = fill(folder)
        for step in range(2, 102):  # more than what is left of the log's last page
            log.write(step, {"loss": 0.5, "metric": 0.1234567890123456})
        assert len(read_lines(folder / "metrics.jsonl")) < 101
        filler.unlink()
        log.write(102, {"loss": 0.4})
        assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == list(range(1, 103))
        fill(folder)
        with MetricsLog(folder, 40):  # a run goes back while the disk is full
            assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == list(range(1, 41))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("the metrics of step ") and "No space left on device" in said[0]
    assert [step for step, tag, *_ in events(folder) if tag == "loss"] == list(range(1, 103))


def events(folder):
    """What TensorBoard's files say: (step, name, value) and (step, "start")."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = data[12 : 12 + size]
            for part, at in ((data[:8], 8), (event, 12 + size)):
                assert masked_crc32c(part) == int.from_bytes(data[at : at + 4], "little")
            event = Event.FromString(event)
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            found += [(event.step, "start")] if event.HasField("session_log") else []
            data = data[16 + size :]
    return found


def test_tensorboard_reads_the_events_of_a_run_that_goes_on(tmp_path):
    for start, steps in ((0, (1, 2)), (1, (2, 3))):
        with MetricsLog(tmp_path, start) as log:
            for step in steps:
                log.write(step, {"loss": step / 4})
    first, second = [(1, "loss", 0.25), (2, "loss", 0.5)], [(2, "loss", 0.5), (3, "loss", 0.75)]
    assert events(tmp_path) == [*first, (2, "start"), *second]


def test_a_run_killed_before_its_first_checkpoint_starts_again(config, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # as Orbax leaves it while the step compiles
    assert int(train(config(steps=2)).step) == 2


def test_a_lost_description_costs_nothing(six_steps, config, tmp_path):
    shutil.copytree(six_steps[0], tmp_path / "run")
    description = tmp_path / "run" / "config.json"
    whole = description.read_text()
    description.write_bytes(whole.encode()[:100] + b"\xff")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read .*; remove it"):
        train(config(steps=6))
    description.unlink()
    with pytest.raises(ConfigError, match=r"--train\.seed is 1; the run in .* has 0"):
        train(config(steps=6, seed=1))
    same_bits(train(config(steps=6)), six_steps[1])
    assert description.is_file()


def test_what_fails_with_whole_files_is_no_damage(six_steps, config, tmp_path, monkeypatch):
    shutil.copytree(six_steps[0], tmp_path / "run")

    def too_large(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(Checkpoints, "_restore_arrays", too_large)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config(steps=6))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_step_1_is_written_beside_step_10(six_steps, config, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(six_steps[0] / "checkpoints" / "6", checkpoints / "10.leftover")
    assert int(train(config(steps=1)).step) == 1
    assert find_damage(checkpoints / "1") == ""
