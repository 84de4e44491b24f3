"""Measure generated digits, or how likely a network finds pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from dit_jax.commands import EXIT_BAD_OPTION
from dit_jax.config import ConfigError


@dataclass(frozen=True)
class EvaluateArgs:
    """Measure samples of the digits run against the real digits, or the likelihood of latents under any run."""

    npz: str = "runs/digits/samples.npz"
    """Samples as sample.py --npz writes them: pictures and the classes asked for."""
    likelihood: bool = False
    """Instead of samples, measure the run in --workdir: bits per dimension of latents that it has not seen."""
    workdir: str = "runs/digits"
    """With --likelihood: folder of the run."""
    data: str | None = None
    """With --likelihood: dataset of held-out pictures, made by prepare.py (digits: their test split)."""
    count: int = 364
    """With --likelihood: latents at most."""
    steps: int = 50
    """With --likelihood: steps of the ODE, of two evaluations each."""
    batch_size: int = 32
    """With --likelihood: latents at once."""


def main(program: str, args: Sequence[str]) -> int:
    """Print the referee's agreement and the Frechet distance of samples beside those of real digits, or bits per
    dimension."""
    description = f"Measure generated digits: {program} --npz runs/digits/samples.npz"
    options = tyro.cli(EvaluateArgs, args=args, prog=program, description=description)
    from dit_jax.evaluation import digits, likelihood
    from dit_jax.evaluation.samples import load_samples

    try:
        if options.likelihood:
            o = options
            print(likelihood.report(o.workdir, o.data, o.count, o.steps, o.batch_size))
        else:
            print(digits.report(*load_samples(options.npz)))
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_BAD_OPTION
    return 0
