"""Draw pictures from a trained run: python sample.py --workdir runs/digits --num-samples 64 --out grid.png"""

import sys

from dit_jax.commands import run

if __name__ == "__main__":
    sys.exit(run("sample", "sample.py"))
