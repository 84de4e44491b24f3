"""Measure generated digits: python evaluate.py --npz runs/digits/samples.npz"""

import sys

from dit_jax.commands import run

if __name__ == "__main__":
    sys.exit(run("evaluate", "evaluate.py"))
