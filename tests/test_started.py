"""What the tests of processes stand on: codes are looked at, what was said is shown, Gloo gets a second chance."""

import signal

import pytest
import started
from started import finish, start, together, wait_for

GLOO = "raise SystemExit('Gloo context initialization failed: DEADLINE_EXCEEDED')"
TAKEN = "raise SystemExit('Failed to add port to server: No address added')"


def test_a_code_that_was_not_expected_is_shown_with_all_that_was_said():
    talk = "import sys; print('out of {0}'); sys.exit('err of {0}')"
    with pytest.raises(AssertionError, match=r"(?s)0: 1\nout of a\nerr of a\n.*1: 0\n"):
        finish(start("-c", talk.format("a")), start("-c", ""))
    (process,) = finish(start("-c", talk.format("a")), code=1)
    assert (process.out, process.err) == ("out of a\n", "err of a\n")


def test_what_never_happens_is_not_waited_for_when_the_process_has_ended():
    with pytest.raises(AssertionError, match="0: 3\n"):
        wait_for(lambda: False, start("-c", "raise SystemExit(3)"))


@pytest.mark.parametrize("problem", [GLOO, TAKEN])
def test_processes_are_started_again_where_that_may_help(problem):
    tried = []

    def arguments(address, index):
        tried.append((address, index))
        return "-c", problem if tried == [(address, 0)] else ""

    assert [process.returncode for process in together(arguments)] == [0, 0]
    assert [index for _, index in tried] == [0, 1, 0, 1]
    with pytest.raises(AssertionError, match=r"Gloo context|add port"):
        together(lambda address, index: ("-c", problem))
    tried.clear()
    with pytest.raises(AssertionError, match="not of Gloo's"):
        together(lambda *which: (tried.append(which), ("-c", "raise SystemExit('not of Gloo\\'s')"))[1])
    assert len(tried) == 2


def test_nothing_is_left():
    process = start("-c", "import time; print('up', flush=True); time.sleep(1000)")
    wait_for(lambda: process.out == "up\n", process)
    started.end_all()
    assert process.returncode == -signal.SIGKILL
