"""Ctrl-C while a script starts and works: one line and code 130. (train.py: tests/training/test_launch.py)"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for the moment of a signal"),
]


def interrupt(delay, script, *args):
    """(exit code, stderr) of a script that gets SIGINT so long after its first thread has started."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while len(os.listdir(f"/proc/{process.pid}/task")) < 2 and process.poll() is None:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=200)
    return process.returncode, said


DIGITS = ("--source", "digits", "--no-mirrors", "--vae", "digits", "--image-size", "32", "--batch-size", "1")


@pytest.mark.parametrize(("script", "delay"), [("prepare.py", 0), ("sample.py", 0.3), ("evaluate.py", 0)])
def test_an_interrupted_script_says_one_line(script, delay, tmp_path):
    args = (*DIGITS, "--out", tmp_path / "set") if script == "prepare.py" else ()
    code, said = interrupt(delay, script, *args)
    assert "Traceback" not in said, said
    assert (code, said.count(f"{script}: interrupted")) == (130, 1), said
    assert not list(tmp_path.glob("set/.unfinished/shard-*"))
