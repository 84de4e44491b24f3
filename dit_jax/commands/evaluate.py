"""Measure samples, or how likely a network finds pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tyro

from dit_jax.commands import EXIT_BAD_OPTION
from dit_jax.config import ConfigError
from dit_jax.evaluation.options import CompareArgs


@dataclass(frozen=True)
class EvaluateArgs(CompareArgs):
    """Measure samples against a reference, the digits runs' by a referee of digits without one, or the likelihood of
    latents under any run."""

    npz: str = "runs/digits/samples.npz"
    """Samples as sample.py --npz writes them: pictures and the classes asked for."""
    vae: str | None = None
    """Where the autoencoder of a reference made by prepare.py lies, if it has moved: a diffusers folder or hub id."""
    out: str | None = None
    """With --reference: .json file for the result, which also goes to evaluations.jsonl in the run's folder."""
    clip: str | None = None
    """Instead of a reference, the CLIP score of samples with captions: a CLIP of transformers, a folder or hub id
    such as openai/clip-vit-large-patch14."""
    prompts: str | None = None
    """With --layout: the benchmark's own prompts, from which sample.py --prompts drew: GenEval's
    evaluation_metadata.jsonl, or DPG-Bench's folder of .txt."""
    layout: str | None = None
    """New folder for the samples' pictures as that benchmark's scorer reads them."""
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
    """Print metrics of samples against a reference, drawn for it out of a run or read from a file; the referee's
    agreement and the Frechet distance of digits beside those of real ones; or bits per dimension."""
    if _draws(args):
        return _score(program, args)
    description = (
        f"Measure samples: {program} --npz samples.npz --reference VIRTUAL_imagenet256_labeled.npz\n\n"
        f"{program} --workdir RUN draws the samples itself: see {program} --workdir RUN --help."
    )
    options = tyro.cli(EvaluateArgs, args=args, prog=program, description=description)
    try:
        print(_measured(options))
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_BAD_OPTION
    return 0


def _draws(args: Sequence[str]) -> bool:
    """Whether samples are to be drawn out of a run: it is named, and no file of samples."""
    named = {arg.partition("=")[0] for arg in args}
    return "--workdir" in named and not named & {"--npz", "--likelihood"}


def _score(program: str, args: Sequence[str]) -> int:
    """Draw samples and print their metrics. When one process of several fails, all end with its code."""
    from dit_jax.commands.drawing import run_drawing
    from dit_jax.generation import scoring

    def do(options: scoring.ScoreArgs, join: Callable[[], None]) -> int:
        join()
        for found in scoring.main(options):
            scale = (found.provenance.guidance or {}).get("scale")
            print(f"guidance {scale}: {found.table()}" if len(options.cfg_scale) > 1 else found.table())
        return 0

    example = f"{program} --workdir runs/digits --num-samples 50000"
    return run_drawing(program, args, scoring.ScoreArgs, f"Measure a run: {example}", do)


def _measured(o: EvaluateArgs) -> str:
    if o.likelihood:
        from dit_jax.evaluation import likelihood

        return likelihood.report(o.workdir, o.data, o.count, o.steps, o.batch_size)
    if (o.layout is None) != (o.prompts is None):
        raise ConfigError("--prompts and --layout go together; expected both or neither")
    if o.clip is not None or o.layout is not None:
        from dit_jax.evaluation import captions

        lines = [captions.write_layout(o.npz, o.prompts, o.layout)] if o.layout and o.prompts else []
        return "\n".join([*lines, *([captions.report(o.npz, o.clip)] if o.clip else [])])
    if o.reference is not None:
        from dit_jax.compiler import keep_compiled_programs
        from dit_jax.evaluation.report import evaluate_file

        keep_compiled_programs()
        found = evaluate_file(
            o.npz, o.reference, o.features, o.inception, o.convention, o.split, o.vae, o.out
        )
        return found.table()
    from dit_jax.evaluation import digits, digits_text
    from dit_jax.evaluation.samples import load_pictures, load_prompts, load_provenance, load_samples

    if load_provenance(o.npz).prompts:
        return digits_text.report(load_pictures(o.npz)[0], load_prompts(o.npz))
    return digits.report(*load_samples(o.npz))
