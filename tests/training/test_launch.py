"""Runs as users start them: several processes, signals, exit codes. Each is a `python train.py` of its own."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from dit_jax.config import ConfigError, to_json
from dit_jax.runs.checkpoint import find_damage
from dit_jax.runs.log import read_lines
from dit_jax.training import launch

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


def free_port():
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two(config_file, *own, devices=2):
    """Two processes of so many devices each; `own` are options that only the first, and only the second, gets."""
    shared = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-index")
    own = own or ((), ())
    return [start(config_file, *shared, str(i), *own[i], devices=devices) for i in range(2)]


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


def wait_for(happened, timeout=200):
    """Return when happened() is true."""
    end = time.monotonic() + timeout
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"{happened} did not happen")
        time.sleep(0.01)


def wait_for_step(workdir, step):
    """Return when the log has reached the step."""
    wait_for(lambda: any(line["step"] >= step for line in read_lines(workdir / "metrics.jsonl")))


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
    wait_for(lambda: (tmp_path / "run" / ".lock").exists())
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


def lead_refuses(config_file, latents, tmp_path):
    (tmp_path / "file").touch()
    processes = start_two(
        config_file("run"), ("--train.workdir", str(tmp_path / "file" / "run")), (), devices=1
    )
    return processes, launch.EXIT_BAD_OPTION, "where no file can be written"


def second_reads_a_damaged_shard(config_file, latents, tmp_path):
    copy = tmp_path / "latents"
    shutil.copytree(latents, copy)
    for shard in copy.glob("*.array_record-*"):
        shard.write_bytes(bytes(byte ^ 4 * (i % 500 == 250) for i, byte in enumerate(shard.read_bytes())))
    file = config_file("run", steps=10**6, log_every=1, checkpoint_every=1)
    processes = start_two(file, (), ("--data.dir", str(copy)), devices=1)
    return processes, launch.EXIT_BAD_OPTION, "cannot be read"


@pytest.mark.slow
@pytest.mark.parametrize("fail", [lead_refuses, second_reads_a_damaged_shard])
def test_when_one_process_fails_all_end_with_its_code_and_its_sentence(fail, config_file, latents, tmp_path):
    processes, expected, sentence = fail(config_file, latents, tmp_path)
    codes, outputs = finish(*processes)
    output = "".join(outputs)
    assert codes == [expected, expected], output
    assert output.count(sentence) == 1
    assert "Traceback" not in output and "rror:" not in output, output


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for the moment of a signal")


def takes_sigterm(process):
    """Whether it has a handler for SIGTERM; Python itself sets none."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@needs_proc
@pytest.mark.slow
def test_signals_at_any_moment_of_a_start_are_one_line_and_a_code(config_file):
    file = config_file("run", steps=10**6)

    def end_by(number, delay, *args, until=lambda: True):
        process = start(file, *args, devices=1)
        wait_for(lambda: takes_sigterm(process) and until())
        time.sleep(delay)
        process.send_signal(number)
        (code,), (output,) = finish(process)
        moment = f"{signal.Signals(number).name} after {delay} s: {output}"
        assert "Traceback" not in output, moment
        assert output.count("the same command goes on") == 1, moment
        assert code == (launch.EXIT_STOPPED if number == signal.SIGTERM else launch.EXIT_INTERRUPTED), moment

    for delay in (0, 0.5, 2):
        end_by(signal.SIGTERM, delay)
    for number in (signal.SIGINT, signal.SIGTERM):  # waits in C++ for a process that never comes
        port = free_port()
        shared = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-index", "0")
        end_by(number, 0.5, *shared, until=lambda port=port: listens(port))
    end_by(signal.SIGINT, 0.3, *shared)


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
    monkeypatch.setattr(launch.jax.distributed, "initialize", lambda *args, **_: calls.append(args))
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


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--compile-for", ""], "--compile-for is empty"),
        (["--slices", "2"], "--slices is 2; expected 1 or more, with --compile-for"),
        (["--compile-for", "v5e:2x2", "--slices", "0"], "--slices is 0; expected 1 or more"),
        (["--coordinator", "h:1", "--num-processes", "0", "--process-index", "0"], "--num-processes is 0"),
    ],
)
def test_launch_options_that_mean_nothing_are_refused(args, sentence):
    with pytest.raises(ConfigError, match=sentence):
        launch.initialize(launch.parse_launch(args)[0])


def test_a_count_of_processes_that_is_no_number_is_no_launcher(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2(x4)")
    assert not launch._under_a_launcher()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert launch._under_a_launcher()
