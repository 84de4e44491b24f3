"""The script that counts what a run survives, with a few kills."""

import pathlib
import random

import pytest

TOOLS = pathlib.Path(__file__).parents[2] / "tools"


@pytest.mark.slow
def test_a_run_survives_kills(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device: the processes start sooner
    import inject_faults

    assert inject_faults.trial_full_from_the_start(tmp_path) == ""
    survived, lost, notes = inject_faults.trial_kills(tmp_path, 2, random.Random(0))
    assert (survived, lost) == (2, 0), notes
