"""Measure generated digits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from dit_jax.commands import EXIT_BAD_OPTION
from dit_jax.config import ConfigError


@dataclass(frozen=True)
class EvaluateArgs:
    """Measure samples of the digits run against the real digits."""

    npz: str = "runs/digits/samples.npz"
    """Samples as sample.py --npz writes them: pictures and the classes asked for."""


def main(program: str, args: Sequence[str]) -> int:
    """Print the referee's agreement and the Frechet distance of samples beside those of real digits."""
    description = f"Measure generated digits: {program} --npz runs/digits/samples.npz"
    options = tyro.cli(EvaluateArgs, args=args, prog=program, description=description)
    from dit_jax.evaluation.digits import report
    from dit_jax.evaluation.samples import load_samples

    try:
        print(report(*load_samples(options.npz)))
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_BAD_OPTION
    return 0
