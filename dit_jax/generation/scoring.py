"""What evaluate.py --workdir does: samples of a run drawn into features, and measured against a reference.

Pictures are never gathered: every process makes features of its own, and keeps those. Letters: N samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

from dit_jax import paths
from dit_jax.config import ConfigError
from dit_jax.data.metadata import METADATA_FILE, LatentMetadata, load_metadata
from dit_jax.evaluation.features import FeatureExtractor, Features
from dit_jax.evaluation.metrics import FILE as FILE
from dit_jax.evaluation.metrics import Evaluation, append_evaluation, evaluate
from dit_jax.evaluation.options import CompareArgs
from dit_jax.evaluation.references import Reference, load_reference
from dit_jax.evaluation.report import FeatureName, choose_extractor, compares_with_digits
from dit_jax.evaluation.samples import Provenance
from dit_jax.files import check_file, check_folder, write_whole
from dit_jax.generation.command import (
    Run,
    load_guide,
    load_run,
    networks,
    provenance,
    recipe,
)
from dit_jax.generation.curve import check_plot, plot_guidance
from dit_jax.generation.decoding import load_decoder
from dit_jax.generation.options import DrawArgs, check_range, drawing
from dit_jax.generation.parts import Parts
from dit_jax.generation.prompts import Asked, asked_of, check_asked
from dit_jax.generation.room import check_batch
from dit_jax.generation.sampling import device_mesh, samples_of, sampling_model
from dit_jax.generation.stream import Source, draw, on_own_devices
from dit_jax.processes import agree, on_lead

FOLDER = "evaluations.parts"  # in a run's folder
_OF_THE_METRICS = {"reference", "split", "inception", "plot"}
"""Options that do not change the features of the samples."""


@dataclass(frozen=True)
class ScoreArgs(CompareArgs, DrawArgs):
    """Draw samples of a run and measure them against a reference; nothing but their features is kept."""

    workdir: str = "runs/digits"
    """Folder of the run. Results go to its evaluations.jsonl; a command that was killed goes on when given again."""
    num_samples: int = 50_000
    """Samples."""
    cfg_scale: list[float] = field(default_factory=lambda: [1.5])
    """Guidance scale, 1 for none; several are measured one after the other and drawn as a curve."""
    plot: str | None = None
    """With several scales: PNG file for the curve (default: WORKDIR/guidance.png)."""


@dataclass(frozen=True)
class Ruler:
    """What samples are measured by: features, and in process 0 the reference in the same ones."""

    extractor: FeatureExtractor
    reference: Reference | None


def open_ruler(
    option: str,
    reference: str | None,
    metadata: LatentMetadata,
    split: str = "train",
    features: FeatureName | None = None,
    inception: str | None = None,
    convention: Literal["adm", "pytorch-fid"] = "adm",
    vae: str | None = None,
) -> Ruler:
    """The ruler for samples of a run; all processes call this. None: a run on the digits is compared with these.

    vae: where the run's autoencoder lies, if it has moved; it is that of a prepared reference too if it made it.
    Raises ConfigError, naming `option`, where there is no reference, and for weights and pictures that do not fit.
    """
    if not reference:
        if not metadata.source.startswith("digits"):
            raise ConfigError(
                f"{option} is missing and the run's data are {metadata.source}; expected what samples are "
                "compared with: an .npz of statistics or pictures, or a folder of pictures"
            )
        reference = "digits"
    side, name = metadata.image_size, reference
    extractor = choose_extractor(features, inception, convention, compares_with_digits(reference))
    extractor.check("the run", (0, side, side, 3))
    found: list[Reference] = []

    def load() -> None:
        moved = vae if _made_by(name, metadata.vae_hash) else None
        found.append(load_reference(name, extractor, side, split, moved))

    on_lead(load)
    return Ruler(extractor, found[0] if found else None)


def _made_by(reference: str, vae_hash: str) -> bool:
    """Whether a reference is a prepared dataset of this autoencoder."""
    folder = paths.from_user(reference)
    return paths.is_file(folder / METADATA_FILE) and load_metadata(folder).vae_hash == vae_hash


def features_of_parts(parts: Parts) -> Features:
    """Features of all samples, in their order: the same however they came to the parts."""
    found, at = Features(), 0
    for part in parts.read():
        count = len(next(iter(part.values())))
        found.add(np.arange(at, at + count), part)
        at += count
    return found


def main(args: ScoreArgs) -> list[Evaluation]:
    """The results, one for each scale; none in processes other than 0."""
    check_range("--num-samples", args.num_samples)
    run = load_run(args.workdir)
    model = sampling_model(run.config)
    asked = asked_of(args, run, model)
    guide = None if args.guide_workdir is None else load_guide(args.guide_workdir, run)
    every = [drawing(args, scale) for scale in _scales(args.cfg_scale)]
    for options in every:
        check_asked(model, run, options, asked, guide)
        check_batch(
            run.config, min(args.batch_size, args.num_samples), options.cfg_scale != 1, jax.device_count()
        )
    plot = args.plot or str(run.workdir / "guidance.png")
    on_lead(lambda: _check_outputs(args, plot, run.workdir))
    ruler = open_ruler(
        "--reference",
        args.reference,
        run.metadata,
        args.split,
        args.features,
        args.inception,
        args.convention,
        args.vae,
    )

    asked = asked.embedded(model.condition)
    mesh = device_mesh()
    params, guide_model, steps = networks(args, run, guide, mesh)
    condition = asked.conditions(asked.rows(args, args.num_samples))
    decoder = load_decoder(run.metadata, args.vae, args.decode_batch)
    first = Source(
        model, params, run.config, every[0], condition, decoder, mesh, args.seed, args.batch_size, guide_model,
        asked.null,
    )  # fmt: skip
    results = []
    for options in every:
        source = dataclasses.replace(first, options=options)
        decides = _recipe(args, run, steps, options.cfg_scale, ruler.extractor, asked)
        came_from = provenance(args, run, options, steps["step"], asked)
        results += _measure(run, on_own_devices(source), decides, ruler, came_from)
    if jax.process_index() == 0:
        if len(results) > 1:
            plot_guidance(plot, [options.cfg_scale for options in every], results)
        _drop_parts(run.workdir, args.cfg_scale)
    return results


def _drop_parts(workdir: pathlib.Path, scales: Sequence[float]) -> None:
    """Take away what these scales have left; another command may be at work on others."""
    for scale in scales:
        paths.remove(workdir / FOLDER / f"{scale:g}")
    if not paths.is_remote(workdir):
        with contextlib.suppress(OSError):  # not empty
            (workdir / FOLDER).rmdir()


def _scales(given: Sequence[float]) -> list[float]:
    if not given or len(set(given)) < len(given):
        raise ConfigError(
            f"--cfg-scale is {' '.join(map(str, given)) or 'empty'}; expected numbers, each once"
        )
    return sorted(given)


def _check_outputs(args: ScoreArgs, plot: str, workdir: pathlib.Path) -> None:
    check_folder("--workdir", workdir)
    if len(args.cfg_scale) > 1:
        check_plot()
        check_file("--plot", plot, 0)
    elif args.plot is not None:
        raise ConfigError(f"--plot is {args.plot} with one --cfg-scale; expected several, for a curve")


def _recipe(
    args: ScoreArgs,
    run: Run,
    steps: dict[str, Any],
    scale: float,
    extractor: FeatureExtractor,
    asked: Asked,
) -> dict[str, Any]:
    """All that decides the features of the samples of one scale."""
    found = recipe(args, run, steps, asked) | {"cfg_scale": scale, "weights_hash": extractor.weights_hash}
    found |= {"features": extractor.name, "convention": extractor.convention}
    return {name: value for name, value in found.items() if name not in _OF_THE_METRICS}


def _measure(
    run: Run, source: Source, decides: Mapping[str, Any], ruler: Ruler, came_from: Provenance
) -> list[Evaluation]:
    """The result of one scale, in process 0; one that is there already is taken as it is."""
    folder = run.workdir / FOLDER / f"{source.options.cfg_scale:g}"
    result = folder / f"{on_lead(lambda: ruler.reference and ruler.reference.hash)}.json"
    with Parts("--workdir", folder, decides, samples_of(source.condition)) as parts:
        if not on_lead(lambda: paths.is_file(result)):
            draw(source, parts, ruler.extractor, progress=True)
            agree()
        if ruler.reference is None:
            return []
        if paths.is_file(result):
            return [_read(json.loads(result.read_text()))]
        labels = source.condition.get("label")
        found = evaluate(features_of_parts(parts), ruler.reference, ruler.extractor, labels, came_from)
        append_evaluation(run.workdir, found)
        write_whole(result, json.dumps(dataclasses.asdict(found)))
        parts.clear()
        return [found]


def _read(values: dict[str, Any]) -> Evaluation:
    return Evaluation(**values | {"provenance": Provenance(**values["provenance"])})
