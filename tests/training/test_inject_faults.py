"""The script that counts what a run survives, with a few kills."""

import importlib
import pathlib
import random

import pytest

TOOLS = pathlib.Path(__file__).parents[2] / "tools"


@pytest.fixture
def inject_faults(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device: the processes start sooner
    return importlib.import_module("inject_faults")


@pytest.mark.slow
def test_a_run_survives_kills(inject_faults, tmp_path):
    survived, lost, notes = inject_faults.trial_kills(tmp_path, 2, random.Random(0))
    assert (survived, lost) == (2, 0), notes


@pytest.mark.slow
def test_a_run_survives_a_full_disk(inject_faults, tmp_path):
    try:
        assert inject_faults.trial_full_from_the_start(tmp_path) == ""
        assert inject_faults.trial_full_disk(tmp_path) == ""
    except PermissionError as error:
        pytest.skip(f"{error}")
