"""How the processes of one run end: together, with one code, and one of them says why. (Runs: tests/training)"""

import pytest
from started import together

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
    def arguments(address, index):
        return "-c", PROGRAM, address, index, how

    processes = together(arguments, code=code)
    assert "".join(process.err for process in processes).strip() == said
