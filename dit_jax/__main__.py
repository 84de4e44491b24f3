"""`python -m dit_jax`: the same as `dit-jax`."""

import sys

from dit_jax.commands import main

if __name__ == "__main__":
    sys.exit(main())
