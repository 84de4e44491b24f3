"""Encode images into a latent dataset, or inspect one.

python prepare.py --source folder:flowers --vae stabilityai/sd-vae-ft-mse --image-size 256 --out data/flowers
python prepare.py inspect data/flowers
"""

import sys

from dit_jax.commands import run

if __name__ == "__main__":
    sys.exit(run("prepare", "prepare.py"))
