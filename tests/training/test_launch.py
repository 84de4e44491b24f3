"""Runs as users start them: several processes, signals, exit codes. Each is a `python train.py` of its own."""

import json
import pathlib
import shutil
import signal
import socket
import sys
import time

import numpy as np
import pytest
from started import finish, free_port, joined, start, together, wait_for

from dit_jax.config import ConfigError, to_json
from dit_jax.runs.checkpoint import find_damage
from dit_jax.runs.log import read_lines
from dit_jax.training import launch


def train(config_file, *args, devices=1):
    """`python train.py` on that many virtual CPU devices."""
    return start("train.py", "--config", config_file, *args, devices=devices)


def two(config_file, *own):
    """For `together`: two processes; `own` are options that only the first, and only the second, gets."""
    return joined("train.py", "--config", config_file, own=own or ((), ()))


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


def wait_for_step(workdir, step, *processes):
    """Return when the log has reached the step."""
    wait_for(lambda: any(line["step"] >= step for line in read_lines(workdir / "metrics.jsonl")), *processes)


@pytest.mark.slow
def test_two_processes_are_one_run(config_file, tmp_path):
    mesh = {"preset": "fsdp", "data": 2}
    finish(train(config_file("one", steps=8)))
    together(two(config_file("two", mesh, steps=4)), devices=2)
    whole, parts = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in parts] == [2, 4]  # one writer
    for a, b in zip(whole, parts, strict=False):
        np.testing.assert_allclose([a["loss"], a["vb"]], [b["loss"], b["vb"]], rtol=1e-5)
    assert find_damage(tmp_path / "two" / "checkpoints" / "4") == ""
    assert len(list((tmp_path / "two" / "tensorboard").glob("events*"))) == 1

    # A checkpoint of two processes goes on in one, with the losses of a run that was never interrupted.
    finish(train(config_file("two", mesh, steps=8), devices=4))
    parts = read_lines(tmp_path / "two" / "metrics.jsonl")
    assert [line["step"] for line in parts] == [2, 4, 6, 8]
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(config_file, tmp_path):
    options = {"log_every": 5, "checkpoint_every": 10**6}
    process = train(config_file("run", steps=10**6, **options))
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=launch.EXIT_STOPPED)
    (saved,) = (int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"step {saved} is saved" in process.said

    finish(*(train(config_file(name, steps=saved + 10, **options)) for name in ("run", "whole")))
    parts, whole = (
        [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("run", "whole")
    )
    assert parts == whole  # every line, also the one whose window the signal cut in two


@pytest.mark.slow
def test_sigterm_before_the_first_step_is_a_stop_too(config_file, tmp_path):
    process = train(config_file("run", steps=10**6))
    wait_for((tmp_path / "run" / ".lock").exists, process)
    process.send_signal(signal.SIGTERM)  # while it looks for checkpoints and compiles
    finish(process, code=launch.EXIT_STOPPED)
    assert "asked to stop" in process.said and "Traceback" not in process.said


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both(config_file, tmp_path):
    def stop_the_second(*processes):
        wait_for_step(tmp_path / "run", 5, *processes)
        processes[1].send_signal(signal.SIGTERM)

    file = config_file("run", steps=10**6, log_every=5, checkpoint_every=10**6)
    together(two(file), devices=2, code=launch.EXIT_STOPPED, meanwhile=stop_the_second)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert find_damage(saved) == ""


def lead_refuses(config_file, latents, tmp_path):
    (tmp_path / "file").touch()
    arguments = two(config_file("run"), ("--train.workdir", tmp_path / "file" / "run"), ())
    return arguments, "where no file can be written"


def second_reads_a_damaged_shard(config_file, latents, tmp_path):
    copy = tmp_path / "latents"
    shutil.copytree(latents, copy)
    for shard in copy.glob("*.array_record-*"):
        shard.write_bytes(bytes(byte ^ 4 * (i % 500 == 250) for i, byte in enumerate(shard.read_bytes())))
    file = config_file("run", steps=10**6, log_every=1, checkpoint_every=1)
    return two(file, (), ("--data.dir", copy)), "cannot be read"


@pytest.mark.slow
@pytest.mark.parametrize("fail", [lead_refuses, second_reads_a_damaged_shard])
def test_when_one_process_fails_all_end_with_its_code_and_its_sentence(fail, config_file, latents, tmp_path):
    arguments, sentence = fail(config_file, latents, tmp_path)
    output = "".join(process.said for process in together(arguments, code=launch.EXIT_BAD_OPTION))
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
        process = train(file, *args)
        wait_for(lambda: takes_sigterm(process) and until(), process)
        time.sleep(delay)
        process.send_signal(number)
        finish(process, code=launch.EXIT_STOPPED if number == signal.SIGTERM else launch.EXIT_INTERRUPTED)
        moment = f"{signal.Signals(number).name} after {delay} s: {process.said}"
        assert "Traceback" not in process.said, moment
        assert process.said.count("the same command goes on") == 1, moment

    for delay in (0, 0.5, 2):
        end_by(signal.SIGTERM, delay)
    for number in (signal.SIGINT, signal.SIGTERM):  # waits in C++ for a process that never comes
        port = free_port()
        shared = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-index", "0")
        end_by(number, 0.5, *shared, until=lambda port=port: listens(port))
    end_by(signal.SIGINT, 0.3, *shared)


@pytest.mark.slow
def test_bad_options_are_one_line(config_file, tmp_path):
    process = train(config_file("run"), "--train.batch-size", 10, devices=4)
    (output,) = (ended.said for ended in finish(process, code=launch.EXIT_BAD_OPTION))
    assert output.splitlines()[-1].startswith(
        "train.py: --train.batch-size is 10; expected a multiple of the 4"
    )
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dry_run_trains_nothing(config_file, tmp_path):
    file = config_file("run", {"preset": "fsdp"}, steps=400)
    (process,) = finish(train(file, "--dry-run", devices=4))
    for part in (
        "data 1, fsdp 4, tensor 1",
        "40 images, 2.5 steps per epoch, 160.0 epochs",
        "GB parameters",
        " h for",
    ):
        assert part in process.said
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
