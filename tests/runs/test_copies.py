"""Emergency copies in one process: they are taken where they are newer, whole and of this run. (Two: test_hosts)"""

import collections
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dit_jax.runs.checkpoint import Checkpoints
from dit_jax.runs.copies import Copies, Layout
from dit_jax.training import loop
from dit_jax.training.loop import train
from dit_jax.training.program import build_program
from dit_jax.training.sharding import make_mesh


class Killed(BaseException):
    """What ends a run in the middle."""


@pytest.fixture
def run(tiny, latents, tmp_path, monkeypatch):
    """A function that trains in tmp_path/NAME, up to `steps`, or until it is killed after `killed` of them."""
    batches = loop.batches

    def train_to(steps, killed=None, name="run", **options):
        def until(*args):
            for number, batch in enumerate(batches(*args)):
                if number == killed:
                    raise Killed
                yield batch

        monkeypatch.setattr(loop, "batches", until)
        where = {"workdir": str(tmp_path / name), "local_checkpoint_dir": str(tmp_path / "local")}
        options = where | {"steps": steps, "local_checkpoint_every": 1, "checkpoint_every": 4} | options
        config = tiny.config(train=options, data={"dir": str(latents)})
        if killed is None:
            return train(config)
        with pytest.raises(Killed):
            train(config)
        return None

    return train_to


@pytest.fixture(scope="module")
def whole(tiny, latents, tmp_path_factory):
    """The last state of a run of eight steps that nobody interrupts, without copies."""
    options = {"workdir": str(tmp_path_factory.mktemp("whole")), "steps": 8, "checkpoint_every": 4}
    return train(tiny.config(train=options, data={"dir": str(latents)}))


def same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def files(tmp_path):
    """Names of the copies, and the folder that they lie in."""
    (folder,) = (tmp_path / "local").iterdir()
    return sorted(file.name for file in folder.iterdir()), folder


def test_a_killed_run_goes_on_from_its_copies_and_removes_them_in_the_end(run, whole, tmp_path, capsys):
    run(8, killed=7)
    names, _ = files(tmp_path)
    assert names == ["000000005.0", "000000006.0", "000000007.0"]
    same_bits(run(8), whole)
    assert "going on from step 7" in capsys.readouterr().err
    assert not list((tmp_path / "local").iterdir())


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:20])


def test_a_damaged_copy_is_left_alone(run, whole, tmp_path, capsys):
    run(8, killed=7)
    _, folder = files(tmp_path)
    flip(folder / "000000007.0")
    cut(folder / "000000006.0")
    shutil.copy(folder / "000000006.0", folder / "000000099.0")
    run(8, killed=2)
    assert files(tmp_path)[0] == ["000000005.0", "000000006.0", "000000007.0"]  # written anew
    flip(folder / "000000007.0")
    cut(folder / "000000006.0")
    same_bits(run(8), whole)
    said = capsys.readouterr().err
    assert said.count("going on from step 5") == 2
    assert said.count("000000007.0 is left alone: ") == said.count("000000006.0 is left alone: ") == 2


def test_copies_of_another_run_or_mesh_are_left_alone(run, tiny, tmp_path, capsys):
    run(8, killed=7)
    config = tiny.config(mesh={"preset": "zero1"})
    program = build_program(config, make_mesh(config.mesh), scaling_factor=0.5, shift_factor=0.1)
    other = Copies(tmp_path / "run", str(tmp_path / "local"), program.state)
    assert other.restore(0, pytest.fail, lambda step: True) is None
    assert capsys.readouterr().err.count("it is of other devices, another mesh or another network") == 3
    shutil.rmtree(tmp_path / "run")  # a run of the same name and config
    run(8, killed=2)
    assert "going on" not in capsys.readouterr().err


def test_each_piece_lies_on_two_hosts():
    """Four processes on two hosts, two devices each: arrays that all hold, that two hold, and that one holds."""

    Device = collections.namedtuple("Device", "number process_index")

    class Spread:
        def __init__(self, parts):
            self.parts = parts

        def devices_indices_map(self, shape):
            size = shape[0] // self.parts
            parts = [slice(size * i, size * (i + 1)) for i in range(self.parts)]
            return {Device(d, d // 2): (parts[d * self.parts // 8],) for d in range(8)}

    like = [SimpleNamespace(shape=(8,), dtype="float32", sharding=Spread(parts)) for parts in (1, 2, 4, 8)]
    layout = Layout.of(like, ["a", "a", "b", "b"])
    assert layout.stride == 2 and layout.moved == {1, 2, 3}
    assert all(len({process // 2 for process in who}) == 2 for who in layout.writers.values())
    assert layout.covered({0, 1}) and layout.covered({2, 3})
    assert layout.covered({0, 1, 2, 3}) and not layout.covered({0, 2})
    assert (
        Layout.of(like, ["a", "b", "c", "d"]).key != layout.key == Layout.of(like, ["x", "x", "a", "a"]).key
    )


def test_a_milestone_that_was_not_finished_is_not_skipped(run, whole, tmp_path, capsys, monkeypatch):
    """It would be missing for good; the run goes back to before it."""

    def full(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "_write_checksums", full)
        run(8, killed=7, milestone_every=4)
    same_bits(run(8, milestone_every=4), whole)
    assert "going on from step 3" not in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


def test_a_full_disk_costs_copies_and_no_run(run, whole, tmp_path, capsys):
    (tmp_path / "local").touch()
    same_bits(run(8), whole)
    assert capsys.readouterr().err.count("a copy could not be written") >= 1
