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
import pathlib
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
    parser.add_argument("--samplers", nargs="*", default=None, help="default: all")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[6, 8, 12, 20])
    parser.add_argument(
        "--grids", nargs="+", default=["uniform"], help="named grids, but for ddpm and dopri5"
    )
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cfg-scale", type=float, default=1.25)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--tables", nargs="*", default=[], help="measure nothing: draw these printed tables")
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
        chosen: Any = None if grid == "own" else grid
        found, count = latents(SamplingOptions(sampler=sampler, steps=steps, grid=chosen), seed)
        if seed not in references:
            references[seed] = latents(REFERENCE, seed)[0]
        error = np.nan if SAMPLERS[sampler].draws else np.sqrt(np.mean((found - references[seed]) ** 2))
        images = np.concatenate([decoder(found[i : i + 250]) for i in range(0, len(found), 250)])
        return Score(class_agreement(referee, images, labels), pixel_frechet(images), float(error)), count

    return score, samplers_for(process)


class Row(NamedTuple):
    """A line of the table: means over seeds, and half the range of the distance."""

    sampler: str
    grid: str
    evaluations: int
    agreement: float
    frechet: float
    spread: float
    error: float

    def __str__(self) -> str:
        error = "      -" if np.isnan(self.error) else f"{self.error:7.4f}"
        return (
            f"{self.sampler:16} {self.grid:10} {self.evaluations:11} {self.agreement:13.1%} {self.frechet:8.2f} "
            f"± {self.spread:4.2f} {error}"
        )

    @classmethod
    def read(cls, line: str) -> Row:
        """The row that was printed as `line`."""
        sampler, grid, count, agreement, frechet, _, spread, error = line.split()
        share = round(float(agreement.removesuffix("%")) / 100, 4)
        distance = float(error.replace("-", "nan"))
        return cls(sampler, grid, int(count), share, float(frechet), float(spread), distance)


HEAD = f"{'sampler':16} {'grid':10} {'evaluations':>11} {'read as asked':>13} {'Frechet':>15} {'error':>7}"


def summary(sampler: str, grid: str, evaluations: int, scores: list[Score]) -> Row:
    """The line of so many seeds' scores."""
    agreement, frechet, error = np.array(scores).T
    spread = (frechet.max() - frechet.min()) / 2
    return Row(sampler, grid, evaluations, agreement.mean(), frechet.mean(), spread, error.mean())


def draw_picture(path: str, rows: list[Row]) -> None:
    """The distance to real digits, and the error, over evaluations: a line for each sampler and grid, level where it
    has one point alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5.5), sharex=True, layout="constrained")
    lines = list(dict.fromkeys((row.sampler, row.grid) for row in rows))
    for i, key in enumerate(lines):
        points = sorted(
            (row for row in rows if (row.sampler, row.grid) == key), key=lambda row: row.evaluations
        )
        counts = [row.evaluations for row in points]
        if len(points) == 1:
            row = points[0]
            label = f"{row.sampler}, {row.evaluations} evaluations"
            axes[0].axhline(row.frechet, color="0.4", linestyle=":", label=label)
            continue
        style = {"marker": "o", "linestyle": ("-", "--", ":")[i // 10 % 3], "label": ", ".join(key)}
        axes[0].plot(counts, [row.frechet for row in points], **style)
        axes[1].plot(counts, [row.error for row in points], **style)
    for axis, name in zip(
        axes, ("Frechet distance to real test digits", "error of the latents (RMS)"), strict=True
    ):
        axis.set(xlabel="evaluations of the network", ylabel=name, yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3)
    figure.legend(
        handles=axes[0].get_legend_handles_labels()[0], loc="outside lower center", fontsize=8, ncols=6
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    args = options()
    if args.tables:
        lines = [line for table in args.tables for line in pathlib.Path(table).read_text().splitlines()]
        rows = [Row.read(line) for line in lines if "±" in line]
    else:
        rows = measure(args)
    if args.out:
        draw_picture(args.out, rows)
        print(f"picture: {args.out}")


def measure(args: argparse.Namespace) -> list[Row]:
    """The table, printed line by line."""
    score, known = make_scores(args)
    names = args.samplers or known
    rows = []
    print(HEAD)
    for name in names:
        adaptive = SAMPLERS[name].evaluations is None
        for grid in ["own"] if adaptive else ["respaced"] if name == "ddpm" else args.grids:
            for evaluations in args.evaluations[: 1 if adaptive else None]:
                scored = [score(name, grid, evaluations, seed) for seed in range(args.seeds)]
                scores, count = [one for one, _ in scored], max(count for _, count in scored)
                rows.append(summary(name, grid, count, scores))
                print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
