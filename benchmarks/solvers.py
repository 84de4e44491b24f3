"""Quality against evaluations of the network, of every sampler, on a trained run of the digits.

    python benchmarks/solvers.py --workdir runs/digits --evaluations 6 8 12 20 --seeds 3 --out solvers.png

For each sampler and number of evaluations: the share of digits that an independent referee reads as asked for, the
Frechet distance to the real test digits (64 pixel features), and how far the latents are from those of the exact ODE
(root mean square, by UniPC-3 in 100 steps from the same noise), where the sampler follows it. Mean over seeds, and
half the range between them.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax.data.digits import NUM_CLASSES
from dit_jax.diffusion.create import create_process
from dit_jax.evaluation.digits import class_agreement, fit_referee, pixel_frechet
from dit_jax.generation.command import load_run
from dit_jax.generation.sampling import SamplingOptions, generate_images, load_decoder, sampling_model
from dit_jax.models.create import init_params
from dit_jax.runs.weights import load_weights
from dit_jax.samplers.table import SAMPLERS, samplers_for

REFERENCE = SamplingOptions(sampler="unipc_3", steps=100, grid="lambda")


class Score(NamedTuple):
    """What is measured of one set of samples."""

    agreement: float
    frechet: float
    error: float


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/digits", help="a run of the digits")
    parser.add_argument("--samplers", nargs="*", default=None, help="default: all that have steps")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[6, 8, 12, 20])
    parser.add_argument("--grids", nargs="+", default=["uniform"], help="named grids, but for ddpm")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cfg-scale", type=float, default=1.25)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--out", default="", help="PNG file for a picture of the table")
    return parser.parse_args()


def make_scores(args: argparse.Namespace) -> Any:
    """(sampler, grid, evaluations, seed) -> (Score, how often the network ran), and the names that serve the run."""
    run = load_run(args.workdir)
    model, process = sampling_model(run.config), create_process(run.config.diffusion)
    mesh, referee = Mesh(np.array(jax.devices()), ("data",)), fit_referee()
    like = jax.eval_shape(lambda key: init_params(model, run.config, key), jax.random.key(0))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), like)
    params, _ = load_weights(run.workdir / "checkpoints", like, run.config, "ema", None)
    decoder, labels = load_decoder(run.metadata), np.arange(args.samples) % NUM_CLASSES
    references: dict[int, np.ndarray] = {}

    def latents(choice: SamplingOptions, seed: int) -> tuple[np.ndarray, int]:
        counts: list[int] = []
        choice = dataclasses.replace(choice, cfg_scale=args.cfg_scale)
        found = generate_images(
            model,
            params,
            run.config,
            choice,
            labels,
            np.asarray,
            mesh,
            seed,
            args.batch_size,
            told=counts.append,
        )
        return found, max(counts)

    def score(sampler: str, grid: str | None, evaluations: int, seed: int) -> tuple[Score, int]:
        steps = max(2, round(evaluations / (SAMPLERS[sampler].evaluations or 1)))
        found, count = latents(SamplingOptions(sampler=sampler, steps=steps, grid=grid), seed)  # type: ignore[arg-type]
        if seed not in references:
            references[seed] = latents(REFERENCE, seed)[0]
        error = np.nan if SAMPLERS[sampler].draws else np.sqrt(np.mean((found - references[seed]) ** 2))
        images = np.concatenate([decoder(found[i : i + 250]) for i in range(0, len(found), 250)])
        return Score(class_agreement(referee, images, labels), pixel_frechet(images), float(error)), count

    return score, samplers_for(process)


def summary(scores: list[Score]) -> str:
    """Means over seeds, and half the range of the distance."""
    agreement, frechet, error = np.array(scores).T
    spread = (frechet.max() - frechet.min()) / 2
    distance = f"{frechet.mean():8.2f}" + (f" ± {spread:4.2f}" if len(scores) > 1 else "")
    return f"{agreement.mean():7.1%} {distance} " + (
        "      -" if np.isnan(error).any() else f"{error.mean():7.4f}"
    )


def draw_picture(path: str, rows: dict[tuple[str, str], list[tuple[int, list[Score]]]]) -> None:
    """The distance to real digits, and the error, over evaluations: a line for each sampler and grid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharex=True)
    for i, ((sampler, grid), points) in enumerate(rows.items()):
        counts = [count for count, _ in points]
        style = {"marker": "o", "linestyle": ("-", "--", ":")[i // 10 % 3], "label": f"{sampler}, {grid}"}
        axes[0].plot(counts, [np.mean([s.frechet for s in scores]) for _, scores in points], **style)
        axes[1].plot(counts, [np.mean([s.error for s in scores]) for _, scores in points], **style)
    for axis, name in zip(
        axes, ("Frechet distance to real test digits", "error of the latents (RMS)"), strict=True
    ):
        axis.set(xlabel="evaluations of the network", ylabel=name, yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    args = options()
    score, known = make_scores(args)
    names = args.samplers or [name for name in known if SAMPLERS[name].evaluations is not None]
    rows: dict[tuple[str, str], list[tuple[int, list[Score]]]] = {}
    print(f"{'sampler':16} {'grid':10} {'evaluations':>11} {'read as asked':>7} {'Frechet':>8} {'error':>7}")
    for name in names:
        for grid in ["respaced"] if name == "ddpm" else args.grids:  # it takes whole timesteps alone
            for evaluations in args.evaluations:
                scored = [score(name, grid, evaluations, seed) for seed in range(args.seeds)]
                scores, count = [one for one, _ in scored], max(count for _, count in scored)
                rows.setdefault((name, grid), []).append((count, scores))
                print(f"{name:16} {grid:10} {count:11} {summary(scores)}", flush=True)
    if args.out:
        draw_picture(args.out, rows)
        print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
