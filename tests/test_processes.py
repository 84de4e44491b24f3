"""How the processes of one run end: together, with one code, and one of them says why. (Runs: tests/training)"""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

PROGRAM = """
import os, signal, sys, time
from dit_jax import processes, signals
from dit_jax.training import launch

signals.leave_on_signals("program", "interrupted", "stopped")
address, index, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
args = ["--coordinator", address, "--num-processes", "2", "--process-index", str(index)]
launch.initialize(launch.parse_launch(args)[0])
signals.watch()
if how == "both fail":
    sys.exit(processes.end(2, "failed"))
if how == "the first is over" and index == 0:
    sys.exit(0)
if how == "both are over":
    sys.exit(75)
if index == 1:
    if how == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
    else:
        sys.exit(processes.end(3, "failed"))
time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("both fail", 2, "failed"),
        ("the first is over", 3, "failed"),
        ("both are over", 75, ""),
        ("interrupted", 130, "program: interrupted"),
    ],
)
def test_all_processes_end_with_the_code_of_the_first_that_fails(how, code, said):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(index), how], cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code, code], "".join(outputs)
    assert "".join(outputs).strip() == said
