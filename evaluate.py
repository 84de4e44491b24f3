"""Measure samples: python evaluate.py --npz samples.npz --reference VIRTUAL_imagenet256_labeled.npz"""

import sys

from dit_jax.commands import run

if __name__ == "__main__":
    sys.exit(run("evaluate", "evaluate.py"))
