"""The trainer from outside: what a run leaves on disk, and that a resumed run is the same run to the bit."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dit_jax.conditions import LabelCondition, TextCondition
from dit_jax.config import ConfigError, load
from dit_jax.runs.checkpoint import Checkpoints, file_checksums
from dit_jax.runs.log import read_lines, truncate
from dit_jax.training import loop
from dit_jax.training.loop import train
from dit_jax.training.sharding import make_mesh


@pytest.fixture
def config(tiny, latents, tmp_path):
    """A function that makes the config of a run in tmp_path; keywords replace options of `train`."""

    def make(name="run", optim=None, data=None, mesh=None, **options):
        return tiny.config(
            train={"workdir": str(tmp_path / name)} | options,
            data={"dir": str(latents)} | (data or {}),
            optim=optim or {},
            mesh=mesh or {},
        )

    return make


def metrics(config):
    """Lines of metrics.jsonl without the ones that depend on the clock."""
    import pathlib

    lines = read_lines(pathlib.Path(config.train.workdir) / "metrics.jsonl")
    clocked = ("images_per_second", "mfu", "goodput", "time_")
    return [{k: v for k, v in line.items() if not k.startswith(clocked)} for line in lines]


def same_bits(a, b):
    """Every leaf of two trees is equal to the bit."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_resume_is_exact_to_the_bit(config):
    # The first part ends in the middle of a window of the log.
    whole = train(config("whole", steps=6, log_every=4, checkpoint_every=3))
    train(config("parts", steps=3, log_every=4, checkpoint_every=3))
    parts = train(config("parts", steps=6, log_every=4, checkpoint_every=3))
    assert int(parts.step) == 6
    same_bits(parts, whole)
    lines = metrics(config("whole"))
    assert [line["step"] for line in lines] == [4, 6]
    resumed = {line["step"]: line for line in metrics(config("parts"))}
    assert [resumed[4], resumed[6]] == lines


def test_an_autoencoder_out_of_reach_is_refused_before_a_run_that_draws_samples(config, tmp_path):
    message = "--train.sample-every is 2, but the dataset's autoencoder cannot be read: .*; expected 0, or --data.vae"
    with pytest.raises(ConfigError, match=message):
        train(config(sample_every=2, sample_steps=3))
    assert not (tmp_path / "run").exists()


OUT_OF_MEMORY = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nHeap"
)


@pytest.mark.parametrize(
    "error", [OSError("no space left"), FloatingPointError("samples are not finite"), OUT_OF_MEMORY]
)
def test_samples_that_fail_do_not_end_a_run(config, monkeypatch, capsys, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("dit_jax.generation.check_sample_grids", lambda *args: None)
    monkeypatch.setattr("dit_jax.generation.write_sample_grid", fail)
    assert int(train(config(steps=2, sample_every=1, sample_steps=3)).step) == 2
    said = "".join(capsys.readouterr())
    assert f"no grid of samples at step 1: {str(error).splitlines()[0]}\n" in said
    assert "Heap" not in said


def test_what_else_fails_while_samples_are_drawn_ends_a_run(config, monkeypatch):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("UNKNOWN: another process is gone")

    monkeypatch.setattr("dit_jax.generation.check_sample_grids", lambda *args: None)
    monkeypatch.setattr("dit_jax.generation.write_sample_grid", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="is gone"):
        train(config(steps=2, sample_every=1, sample_steps=3))


def test_a_run_leaves_its_files(config, tmp_path):
    c = config(steps=5, log_every=2, checkpoint_every=1, keep=2, milestone_every=2)
    train(c)
    run = tmp_path / "run"
    assert load(run / "config.json") == c
    steps = Checkpoints(run / "checkpoints", keep=9).steps()
    assert steps[-1] == 5
    assert {2, 4, 5} <= set(steps)  # two newest and the milestones
    assert len(steps) <= 4  # and perhaps the best
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5]
    wanted = {"loss", "mse", "vb", "grad_norm", "param_norm", "learning_rate", "images_per_second", "skipped"}
    assert all(wanted <= set(line) for line in lines)
    assert list((run / "tensorboard").glob("events*"))
    again = train(c)  # nothing is left to do
    assert int(again.step) == 5
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [2, 4, 5]


def test_a_contradicting_config_is_refused(config, latents, tmp_path):
    train(config(steps=1))
    with pytest.raises(ConfigError, match=r"--optim\.learning-rate is 0\.5; the run in .*run has 0\.001"):
        train(config(steps=2, optim={"learning_rate": 0.5}))
    with pytest.raises(ConfigError, match=r"--train\.batch-size is 8; the run in .*run has 16"):
        train(config(steps=2, batch_size=8))
    path = tmp_path / "run" / "checkpoints" / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"dataset": "0" * 64}))
    folder = path.parent.parent
    (folder / "checksums.json").write_text(json.dumps(file_checksums(folder)))
    with pytest.raises(ConfigError, match="were trained on another dataset"):
        train(config(steps=2))


def test_two_runs_do_not_train_in_one_folder(config, tmp_path):
    c = config(steps=1)
    (tmp_path / "run").mkdir()
    code = "import pathlib, sys; from dit_jax.runs.workdir import hold\n"
    code += "with hold(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, tmp_path / "run"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=r"--train\.workdir is .*run', where another run is training"):
            train(c)
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
        other.kill()  # a killed run holds nothing
    assert int(train(c).step) == 1


def test_a_restored_run_fits_another_mesh(config):
    train(config(steps=2, mesh={"preset": "replicated"}))
    state = train(config(steps=2, mesh={"preset": "fsdp_tensor", "data": 2}))
    fresh = train(config("other", steps=2))
    assert state.params["blocks"]["mlp"]["fc1"]["kernel"].sharding.shard_shape((2, 32, 64)) == (2, 16, 32)
    same_bits(state.params, fresh.params)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_devices(tiny, config, monkeypatch):
    def train_on(devices, name, **options):
        monkeypatch.setattr(loop, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:devices]))
        return train(config(name, log_every=1, checkpoint_every=100, **options))

    whole = train_on(1, "whole", steps=6)
    train_on(8, "parts", steps=2, mesh={"preset": "fsdp_tensor", "data": 2})
    train_on(4, "parts", steps=4, mesh={"preset": "fsdp"})
    parts = train_on(1, "parts", steps=6)
    assert int(parts.step) == 6 and int(parts.skipped) == 0
    for name in ("params", "ema"):
        assert tiny.relative_difference(getattr(parts, name), getattr(whole, name)) < 1e-5
    for a, b in zip(metrics(config("parts")), metrics(config("whole")), strict=True):
        assert a["step"] == b["step"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    truncate(path, 1)
    assert path.read_text() == '{"step": 1, "loss": 3.0}\n'


def test_lines_of_another_kind_are_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'[1]\n7\n{"loss": 3.0}\n\xff\n{"step": "x"}\n\n{"step": 1}\nnote\n{"step": 2}\n')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    truncate(path, 1)
    assert path.read_bytes().endswith(b'{"step": 1}\nnote\n')


def test_restarts_leave_the_checkpoints_of_a_run_that_was_never_interrupted(config, tmp_path):
    options = {"log_every": 3, "checkpoint_every": 3, "keep": 2, "milestone_every": 12}
    for name, parts in (("parts", (6, 12, 21)), ("whole", (21,))):
        for steps in parts:
            train(config(name, steps=steps, **options))
    left = [
        sorted(int(p.name) for p in (tmp_path / name / "checkpoints").iterdir())
        for name in ("parts", "whole")
    ]
    assert left[0] == left[1]
    assert {12, 18, 21} <= set(left[0]) and len(left[0]) <= 4


def test_grids_of_captions_show_those_of_the_dataset(config, monkeypatch, tmp_path):
    from dit_jax.generation import sampling
    from dit_jax.training.loop import Run

    kind, asked = TextCondition("bytes", 8), {}
    given = {"tokens": np.ones((3, 8), np.int32), "label": np.arange(3)}
    program = SimpleNamespace(model=SimpleNamespace(condition=kind))
    dataset = SimpleNamespace(examples=lambda n: (given, ["a", "b", "c"][:n]))
    run = SimpleNamespace(program=program, config=config(sample_count=3), dataset=dataset)
    condition, captions = Run.examples(run, 3)
    assert set(condition) == {"tokens"} and captions == ["a", "b", "c"]
    run.program.model.condition = LabelCondition(4, 0.1)
    assert Run.examples(run, 3) is None

    def generate(model, params, config, options, condition, *rest):
        asked["condition"] = condition

    monkeypatch.setattr(sampling, "load_decoder", lambda *args: "decoder")
    monkeypatch.setattr(sampling, "generate_images", generate)
    monkeypatch.setattr(sampling, "save_grid", lambda path, images, captions: asked.update(captions=captions))
    sampling.write_sample_grid(
        tmp_path / "grid.png", config=run.config, model=program.model, params={}, metadata=SimpleNamespace(),
        mesh=None, examples=(condition, captions),
    )  # fmt: skip
    assert asked == {"condition": condition, "captions": captions}
