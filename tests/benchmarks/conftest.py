"""The scripts of benchmarks/ import each other by their plain names."""

import pathlib
import sys

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))
