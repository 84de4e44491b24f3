"""Runs as users start them: several processes, signals, exit codes. Each is a `python train.py` of its own."""

import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from dit_jax.config import ConfigError, to_json
from dit_jax.training import launch
from dit_jax.training.checkpoint import find_damage
from dit_jax.training.logging import read_lines

ROOT = pathlib.Path(__file__).parents[2]


def start(config_file, *args, devices=4):
    """`python train.py` on that many virtual CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache/jax"), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--config", str(config_file), *args],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    started.append(process)
    return process


started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _no_process_is_left():
    """A test that fails ends the runs that it started: some would go on for ever."""
    yield
    while started:
        with started.pop() as process:
            process.kill()


def start_two(config_file):
    """Two processes of two devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = ("--coordinator", address, "--num-processes", "2", "--process-index")
    return [start(config_file, *shared, str(i), devices=2) for i in range(2)]


def finish(*processes, timeout=240):
    """(exit codes, outputs)."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.fixture
def config_file(tiny, latents, tmp_path):
    """A function that writes the config of a run in tmp_path/NAME and gives its file."""

    def make(name, mesh=None, **options):
        config = tiny.config(
            train={"workdir": str(tmp_path / name)} | options, data={"dir": str(latents)}, mesh=mesh or {}
        )
        file = tmp_path / f"{name}.json"
        file.write_text(to_json(config))
        return file

    return make


def wait_for_step(workdir, step, timeout=200):
    """Return when the log has reached the step."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        lines = read_lines(workdir / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.05)
    raise TimeoutError(f"step {step} was not reached")


@pytest.mark.slow
def test_two_processes_are_one_run(config_file, tmp_path):
    mesh = {"preset": "fsdp", "data": 2}
    codes, outputs = finish(start(config_file("one", mesh, steps=4)))
    assert codes == [0], outputs[0]
    codes, outputs = finish(*start_two(config_file("two", mesh, steps=4)))
    assert codes == [0, 0], "".join(outputs)
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in two] == [2, 4]  # one writer
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose([a["loss"], a["vb"]], [b["loss"], b["vb"]], rtol=1e-5)
    assert find_damage(tmp_path / "two" / "checkpoints" / "4") == ""
    assert len(list((tmp_path / "two" / "tensorboard").glob("events*"))) == 1

    # A checkpoint of two processes goes on in one, with the losses of a run that was never interrupted.
    codes, outputs = finish(start(config_file("two", mesh, steps=8), devices=1 * 4))
    assert codes == [0], outputs[0]
    codes, outputs = finish(start(config_file("one", {}, steps=8), devices=1))
    assert codes == [0], outputs[0]
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in two] == [2, 4, 6, 8]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(config_file, tmp_path):
    options = {"log_every": 5, "checkpoint_every": 10**6}
    file = config_file("run", steps=10**6, **options)
    process = start(file, devices=1)
    wait_for_step(tmp_path / "run", 5)
    process.send_signal(signal.SIGTERM)
    codes, (output,) = finish(process)
    assert codes == [launch.EXIT_STOPPED], output
    (saved,) = (int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"step {saved} is saved" in output

    codes, outputs = finish(start(config_file("run", steps=saved + 10, **options), devices=1))
    assert codes == [0], outputs[0]
    codes, outputs = finish(start(config_file("whole", steps=saved + 10, **options), devices=1))
    assert codes == [0], outputs[0]
    parts, whole = (
        [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("run", "whole")
    )
    assert parts == whole  # every line, also the one whose window the signal cut in two


@pytest.mark.slow
def test_sigterm_before_the_first_step_is_a_stop_too(config_file, tmp_path):
    process = start(config_file("run", steps=10**6), devices=1)
    end = time.monotonic() + 200
    while not (tmp_path / "run" / ".lock").exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # while it looks for checkpoints and compiles
    codes, (output,) = finish(process)
    assert codes == [launch.EXIT_STOPPED], output
    assert "asked to stop" in output and "Traceback" not in output


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both(config_file, tmp_path):
    processes = start_two(config_file("run", steps=10**6, log_every=5, checkpoint_every=10**6))
    wait_for_step(tmp_path / "run", 5)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(*processes)
    assert codes == [launch.EXIT_STOPPED] * 2, "".join(outputs)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert find_damage(saved) == ""


@pytest.mark.slow
def test_bad_options_are_one_line(config_file, tmp_path):
    codes, (output,) = finish(start(config_file("run"), "--train.batch-size", "10"))
    assert codes == [launch.EXIT_BAD_OPTION]
    assert output.splitlines()[-1].startswith(
        "train.py: --train.batch-size is 10; expected a multiple of the 4"
    )
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dry_run_trains_nothing(config_file, tmp_path):
    file = config_file("run", {"preset": "fsdp"}, steps=400)
    codes, (output,) = finish(start(file, "--dry-run"))
    assert codes == [0], output
    for part in (
        "data 1, fsdp 4, tensor 1",
        "40 images, 2.5 steps per epoch, 160.0 epochs",
        "GB parameters",
        " h for",
    ):
        assert part in output
    assert not (tmp_path / "run").exists()


def test_an_interruption_before_the_first_step_is_one_line(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dit_jax.memory.keep_freed_memory", lambda: False)  # this process keeps its malloc
    main = runpy.run_path(str(ROOT / "train.py"))["main"]
    monkeypatch.setitem(main.__globals__, "keep_compiled_programs", lambda: None)
    monkeypatch.setitem(main.__globals__, "parse_args", interrupted)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert main() == launch.EXIT_INTERRUPTED
    said = capsys.readouterr().err
    assert said == "train.py: interrupted; the same command goes on from the last checkpoint\n"


def test_launch_flags():
    options, rest, text = launch.parse_launch(["--dry-run", "--train.steps", "3", "--num-processes", "2"])
    assert options.dry_run
    assert rest == ["--train.steps", "3"]
    assert "--coordinator" in text
    with pytest.raises(ConfigError, match="expected all three or none"):
        launch.initialize(options)
    options, _, _ = launch.parse_launch(
        ["--coordinator", "localhost:1", "--num-processes", "2", "--process-index", "2"]
    )
    with pytest.raises(ConfigError, match="--process-index is 2; expected 0 to 1"):
        launch.initialize(options)


def test_slurm_and_others_are_recognised(monkeypatch):
    calls = []
    monkeypatch.setattr(launch.jax.distributed, "initialize", lambda *args: calls.append(args))
    nothing, _, _ = launch.parse_launch([])
    launch.initialize(nothing)
    assert calls == []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    launch.initialize(nothing)
    assert calls == []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    launch.initialize(nothing)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    launch.initialize(nothing)
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES")
    launch.initialize(launch.parse_launch(["--distributed"])[0])
    launch.initialize(
        launch.parse_launch(["--coordinator", "h:1", "--num-processes", "2", "--process-index", "1"])[0]
    )
    assert calls == [(), (), (), ("h:1", 2, 1)]
    assert json.dumps(vars(nothing))  # plain values
