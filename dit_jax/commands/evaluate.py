"""Measure samples, or how likely a network finds pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from dit_jax.commands import EXIT_BAD_OPTION
from dit_jax.config import ConfigError


@dataclass(frozen=True)
class EvaluateArgs:
    """Measure samples against a reference, the digits run's against the real digits without one, or the likelihood of
    latents under any run."""

    npz: str = "runs/digits/samples.npz"
    """Samples as sample.py --npz writes them: pictures and the classes asked for."""
    reference: str | None = None
    """What samples are compared with by FID, sFID, Inception Score, precision, recall and KID: an .npz of the ADM
    evaluator (arr_0, mu, sigma, mu_s, sigma_s, or some of them), a folder of pictures or of prepare.py, digits,
    folder:PATH, npz:PATH or tfds:NAME."""
    split: str = "train"
    """Split of a reference that is a TFDS dataset or the digits."""
    features: Literal["inception", "digits"] | None = None
    """Features to compare (default: inception where its weights are named, else digits where the reference is)."""
    inception: str | None = None
    """File of the Inception weights, pt_inception-2015-12-05-6726825d.pth or the same as .safetensors (default:
    $DIT_JAX_INCEPTION)."""
    convention: Literal["adm", "pytorch-fid"] = "adm"
    """How pictures are resized for it: as the ADM evaluator and torch-fidelity do, or as pytorch-fid does."""
    out: str | None = None
    """With --reference: .json file for the result, which also goes to evaluations.jsonl in the run's folder."""
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
    """Print metrics of samples against a reference; the referee's agreement and the Frechet distance of digits beside
    those of real ones; or bits per dimension."""
    description = f"Measure samples: {program} --npz samples.npz --reference VIRTUAL_imagenet256_labeled.npz"
    options = tyro.cli(EvaluateArgs, args=args, prog=program, description=description)
    try:
        print(_measured(options))
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_BAD_OPTION
    return 0


def _measured(o: EvaluateArgs) -> str:
    if o.likelihood:
        from dit_jax.evaluation import likelihood

        return likelihood.report(o.workdir, o.data, o.count, o.steps, o.batch_size)
    if o.reference is not None:
        from dit_jax.compiler import keep_compiled_programs
        from dit_jax.evaluation.report import evaluate_file

        keep_compiled_programs()
        found = evaluate_file(o.npz, o.reference, o.features, o.inception, o.convention, o.split, o.out)
        return found.table()
    from dit_jax.evaluation import digits
    from dit_jax.evaluation.samples import load_samples

    return digits.report(*load_samples(o.npz))
