"""Weights from one format into another: python convert.py facebook/DiT-XL-2-256 runs/dit_xl2"""

import sys

from dit_jax.commands import run

if __name__ == "__main__":
    sys.exit(run("convert", "convert.py"))
