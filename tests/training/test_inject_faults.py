"""The script that counts what a run survives, with a few faults."""

import importlib
import pathlib
import random

import pytest

TOOLS = pathlib.Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def inject_faults():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        patch.setenv("XLA_FLAGS", "")  # one device: the processes start sooner
        yield importlib.import_module("inject_faults")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the runs are: they share their data and their compiled programs."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.slow
def test_a_run_survives_kills(inject_faults, root):
    survived, lost, notes = inject_faults.trial_kills(root, 2, random.Random(0))
    assert (survived, lost) == (2, 0), notes


@pytest.mark.slow
def test_a_run_survives_a_full_disk(inject_faults, root):
    try:
        assert inject_faults.trial_full_from_the_start(root) == ""
        assert inject_faults.trial_full_disk(root) == ""
    except PermissionError as error:
        pytest.skip(f"{error}")
