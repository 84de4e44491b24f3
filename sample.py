"""Draw pictures from a trained run: python sample.py --workdir runs/digits --num-samples 64 --out grid.png"""

from __future__ import annotations

import sys

from dit_jax import signals

if __name__ == "__main__":
    signals.leave_on_signals("sample.py", "interrupted")

from dit_jax.memory import keep_freed_memory

keep_freed_memory()  # before NumPy and JAX start threads

import tyro

from dit_jax.compiler import keep_compiled_programs
from dit_jax.config import ConfigError
from dit_jax.generation.command import SampleArgs, main

if __name__ == "__main__":
    signals.watch()
    keep_compiled_programs()
    try:
        sys.exit(main(tyro.cli(SampleArgs, description=__doc__)))
    except ConfigError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
