"""Train a Diffusion Transformer: python train.py [--config configs/RECIPE.py] [--option value ...]."""

import sys

from dit_jax.commands import run

if __name__ == "__main__":
    sys.exit(run("train", "train.py"))
