"""The scripts of studies/ import each other by their plain names; benchmarks/ has a scaling.py as well."""

import importlib.util
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "studies"
sys.path.insert(0, str(FOLDER))


@pytest.fixture(scope="session")
def scaling():
    """studies/scaling.py as a module."""
    spec = importlib.util.spec_from_file_location("study_scaling", FOLDER / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_scaling"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module
