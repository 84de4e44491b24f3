"""The scripts in launch/, run with stand-ins for the commands of clusters; train.py itself reads what they pass."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from dit_jax.training.launch import EXIT_STOPPED

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
ARGUMENTS = ["--config", "configs/digits.py", "--train.workdir", "runs/a name with spaces"]


def put(folder: pathlib.Path, name: str, text: str) -> None:
    """An executable stand-in in `folder`."""
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


def environment(folder: pathlib.Path, **more: str) -> dict[str, str]:
    """Stand-ins come first; CALLS is the file that they write to."""
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "CALLS": str(folder / "calls"), "HOME": str(folder), **more}


def run(script: str, folder: pathlib.Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "launch" / script), *ARGUMENTS]
    return subprocess.run(
        command, env=environment(folder, **more), capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def accepted_by_train(command: str) -> None:
    """train.py reads the options of a command line that a script would run."""
    words = shlex.split(command)
    options = words[words.index("train.py") + 1 :]
    assert options[-4:] == ARGUMENTS
    code = (
        "import sys; from dit_jax.training import launch; from dit_jax.config import parse_args;"
        "options, rest, text = launch.parse_launch(); config = parse_args(rest, more_help=text);"
        "print(options.distributed, config.train.workdir)"
    )
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("runs/a name with spaces\n")
    assert done.stdout.startswith("True") == ("--distributed" in options)


def test_every_case_has_a_script():
    names = {script.name for script in SCRIPTS}
    assert names == {"tpu_pod.sh", "gke_xpk.sh", "slurm_gpu.sh", "single_node_gpu.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_explain_themselves(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    shown = subprocess.run([script], capture_output=True, text=True)
    assert shown.returncode == 2
    assert f"launch/{script.name} --config" in shown.stdout


def test_tpu_pod_waits_for_the_pod_and_runs_on_all_workers(tmp_path):
    put(
        tmp_path,
        "gcloud",
        'echo "$*" >> "$CALLS"\n[[ $* == *value* ]] && echo ACTIVE\n[[ $* != *describe* || $* == *value* ]]',
    )
    done = run("tpu_pod.sh", tmp_path, PROJECT="p", ZONE="z", REPO="https://example.org/dit_jax", SPOT="1")
    assert done.returncode == 0, done.stderr
    describe, create, state, install, train = (tmp_path / "calls").read_text().splitlines()
    assert "queued-resources describe dit --project p --zone z" in describe
    assert "queued-resources create dit" in create and create.endswith("--spot")
    assert "state.state" in state
    assert "--worker=all" in install and ".[tpu]" in install
    assert "--worker=all" in train
    for command in (install, train):
        remote = command.partition("--command ")[2]
        assert subprocess.run(["bash", "-n", "-c", remote]).returncode == 0
    accepted_by_train(train)


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_tpu_pod_does_not_wait_for_a_resource_that_was_taken_back(tmp_path, state):
    put(tmp_path, "gcloud", f'echo "$*" >> "$CALLS"\necho {state}')
    done = run("tpu_pod.sh", tmp_path, PROJECT="p", ZONE="z", REPO="https://example.org/dit_jax")
    assert done.returncode == 1
    assert f"dit is {state}" in done.stderr
    assert "queued-resources delete dit --project p --zone z" in done.stderr
    assert "ssh" not in (tmp_path / "calls").read_text()


def test_tpu_pod_ends_when_it_cannot_ask(tmp_path):
    put(tmp_path, "gcloud", 'echo "$*" >> "$CALLS"\nexit 1')
    done = run("tpu_pod.sh", tmp_path, PROJECT="p", ZONE="z", REPO="https://example.org/dit_jax")
    assert done.returncode == 1
    assert "ssh" not in (tmp_path / "calls").read_text()


def test_xpk_hands_the_command_over(tmp_path):
    put(tmp_path, "xpk", 'printf "%s\\n" "$*" "${@: -1}" >> "$CALLS"')
    done = run("gke_xpk.sh", tmp_path, CLUSTER="c")
    assert done.returncode == 0, done.stderr
    whole, command = (tmp_path / "calls").read_text().splitlines()
    # xpk gives up on codes below 127, 42 apart, that are not named.
    assert f"--restart-on-exit-codes 1,{EXIT_STOPPED} " in whole
    accepted_by_train(command)

    # As xpk runs it in the container: in a subshell, which alone is sent the signal.
    put(tmp_path, "pip", "exit 0")
    put(
        tmp_path,
        "python",
        "trap 'exit 75' TERM; touch \"$HOME/started\"; for ((;SECONDS < 20;)); do sleep 0.05; done",
    )
    wrapper = f'({command}) & until [[ -e "$HOME/started" ]]; do sleep 0.05; done; kill -TERM $!; wait $!'
    stopped = subprocess.run(["bash", "-c", wrapper], env=environment(tmp_path), cwd=ROOT)
    assert stopped.returncode == EXIT_STOPPED


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (75, 0, True), (3, 0, False), (137, 0, True), (75, 100, True), (137, 100, False)],
)
def test_slurm_goes_on_after_a_stop_or_a_kill_alone(tmp_path, code, restarts, requeued):
    put(tmp_path, "srun", f'printf "%q " "$@" >> "$CALLS"; exit {code}')
    put(tmp_path, "scontrol", 'echo "scontrol $*" >> "$CALLS"')
    done = run(
        "slurm_gpu.sh",
        tmp_path,
        SLURM_JOB_ID="7",
        SLURM_CPUS_PER_TASK="12",
        SLURM_RESTART_COUNT=str(restarts),
    )
    assert done.returncode == code, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert ("scontrol requeue 7" in calls) == requeued
    assert calls.startswith("--cpus-per-task=12 ")
    accepted_by_train(calls.partition("scontrol")[0])


@pytest.mark.parametrize(("codes", "runs"), [("0", 1), ("1 137 0", 3), ("2", 1), ("3", 1)])
def test_a_node_tries_again_after_a_crash(tmp_path, codes, runs):
    put(
        tmp_path,
        "python",
        'echo run >> "$CALLS"; codes=($CODES); exit "${codes[$(grep -c run "$CALLS") - 1]}"',
    )
    done = run("single_node_gpu.sh", tmp_path, PYTHON="python", CODES=codes)
    assert done.returncode == int(codes.split()[-1]), done.stderr
    assert (tmp_path / "calls").read_text().count("run") == runs


def test_a_node_passes_a_stop_on_and_does_not_start_again(tmp_path):
    put(
        tmp_path,
        "python",
        "trap 'sleep 0.3; exit 75' TERM; echo run >> \"$CALLS\"; while :; do sleep 0.05; done",
    )
    command = [str(ROOT / "launch" / "single_node_gpu.sh"), *ARGUMENTS]
    process = subprocess.Popen(
        command, env=environment(tmp_path, PYTHON="python"), cwd=ROOT, start_new_session=True
    )
    try:
        end = time.monotonic() + 30
        while not (tmp_path / "calls").exists() and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert (tmp_path / "calls").read_text() == "run\n"


def test_a_stop_is_passed_on_however_early_it_comes(tmp_path):
    put(tmp_path, "python", "trap 'exit 75' TERM; kill -TERM $PPID; while :; do sleep 0.02; done")
    for _ in range(30):  # it sometimes arrives before the script has noted whom to pass it on to
        assert run("single_node_gpu.sh", tmp_path, PYTHON="python").returncode == 75


def test_the_code_of_a_run_that_stops_at_once_is_not_lost(tmp_path):
    put(tmp_path, "python", "trap 'exit 75' TERM; sleep 0.05; kill -TERM $PPID; while :; do sleep 0.02; done")
    # A machine so busy that the run has ended before the script, which the signal woke, goes on.
    slow = '() { builtin wait "$@"; local status=$?; sleep 0.3; return $status; }'
    done = run("single_node_gpu.sh", tmp_path, PYTHON="python", **{"BASH_FUNC_wait%%": slow})
    assert done.returncode == 75
