"""Measure generated digits: python evaluate.py --npz runs/digits/samples.npz"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from dit_jax import signals

if __name__ == "__main__":
    signals.leave_on_signals("evaluate.py", "interrupted")
    signals.watch()

import tyro

from dit_jax.config import ConfigError


@dataclass(frozen=True)
class EvaluateArgs:
    """Measure samples of the digits run against the real digits."""

    npz: str = "runs/digits/samples.npz"
    """Samples as sample.py --npz writes them: pictures and the classes asked for."""


def main(args: EvaluateArgs) -> None:
    """Print the referee's agreement and the Frechet distance of samples beside those of real digits."""
    from dit_jax.evaluation.digits import report
    from dit_jax.evaluation.samples import load_samples

    print(report(*load_samples(args.npz)))


if __name__ == "__main__":
    try:
        main(tyro.cli(EvaluateArgs, description=__doc__))
    except ConfigError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
