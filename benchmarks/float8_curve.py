"""Loss curves of one recipe, trained in float32, in bfloat16 and in bfloat16 with 8-bit products, from one seed.

    JAX_PLATFORMS=cpu python benchmarks/float8_curve.py --steps 300 --workdir runs/float8_curve --png docs/float8.png
    python benchmarks/float8_curve.py --config configs/dit_b2_imagenet256.py --steps 20000 --workdir runs/float8_b2

The runs are the trainer's own, each in a folder below --workdir; a run that was cut off goes on. All three see the
same images, timesteps and noise, so that losses can be compared step by step. How much of a difference lies in the
weights shows when the averaged ones, which sampling uses, are compared in float32, beside those of float32 runs from
two other seeds. A CPU computes 8-bit products in wider units: its losses can be expected of a GPU, its time cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import pathlib
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import Config, load, resolve
from dit_jax.data.latents import open_dataset
from dit_jax.data.loader import batches
from dit_jax.training.loop import train
from dit_jax.training.program import build_program
from dit_jax.training.sharding import batch_sharding, make_mesh

PRECISIONS = {
    "float32": dict(dtype="float32", quantization="none"),
    "bfloat16": dict(dtype="bfloat16", quantization="none"),
    "fp8": dict(dtype="bfloat16", quantization="fp8"),
}
OTHER_SEEDS = (1, 2)  # float32 runs whose averaged weights say what a difference of seeds does
FINAL = 0.1  # share of the steps, the last ones, whose mean is the final loss
COMPARED = 32  # batches over which the averaged weights are compared


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", default="configs/digits.py", help="recipe")
    parser.add_argument("--steps", type=int, default=300, help="steps of each run; its schedule ends there")
    parser.add_argument("--log-every", type=int, default=5, help="steps whose mean is a point of the curve")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of the runs")
    parser.add_argument("--png", type=pathlib.Path, help="picture of the curves")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file of the final losses")
    args = parser.parse_args()
    if args.steps * FINAL < args.log_every or args.log_every < 1:
        parser.error(
            f"--log-every is {args.log_every}; expected 1 to {args.steps * FINAL:.0f}, a tenth of --steps"
        )
    return args


def run_config(args: argparse.Namespace, name: str, seed: int) -> Config:
    """The recipe at one precision, `seed` added to its seed, without samples and with one checkpoint."""
    config = load(args.config)
    fields = dict(
        workdir=str(workdir(args, name, seed)), seed=config.train.seed + seed, steps=args.steps,
        log_every=args.log_every, checkpoint_every=args.steps, sample_every=0,
    )  # fmt: skip
    return resolve(
        dataclasses.replace(
            config,
            compute=dataclasses.replace(config.compute, **PRECISIONS[name]),
            train=dataclasses.replace(config.train, **fields),
        )
    )


def workdir(args: argparse.Namespace, name: str, seed: int) -> pathlib.Path:
    """The folder of a run."""
    return args.workdir / (f"{name}-seed{seed}" if seed else name)


def losses(workdir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps (L,) and mean losses (L,) of the lines that a run has logged; a window without an update has none."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    return np.array([line["step"] for line in lines]), np.array([line["loss"] for line in lines])


def losses_in_float32(averages: dict[str, Any], config: Config) -> dict[str, float]:
    """Mean loss of each run's averaged weights, on the batches and draws that would follow; `config` is the float32
    run's."""
    mesh, dataset = make_mesh(config.mesh), open_dataset(config)
    factors = dataset.metadata
    program = build_program(
        config, mesh, scaling_factor=factors.scaling_factor, shift_factor=factors.shift_factor
    )
    t, found = config.train, {}
    for name, params in averages.items():
        each = []
        data = batches(dataset, t.batch_size, t.seed, t.steps, batch_sharding(mesh), config.data.cache)
        with contextlib.closing(data):
            for step, batch in enumerate(itertools.islice(data, COMPARED), t.steps):
                state = dataclasses.replace(program.start_from(params), step=jnp.int32(step))
                each.append(float(program.step(state, batch)[1]["loss"]))  # of the weights before the update
        found[name] = float(np.mean(each))
    return found


def summary(curves: dict[str, tuple[np.ndarray, np.ndarray]], steps: int) -> dict[str, Any]:
    """Final losses, and each precision's difference from bfloat16: of the final loss, and the largest of a point."""
    final = {name: float(loss[at > steps * (1 - FINAL)].mean()) for name, (at, loss) in curves.items()}
    reference = curves["bfloat16"][1]
    return {
        name: {
            "first_loss": float(loss[0]),
            "final_loss": final[name],
            "final_to_bfloat16": final[name] / final["bfloat16"],
            "largest_difference_to_bfloat16": float(np.abs(loss / reference - 1).max()),
        }
        for name, (_, loss) in curves.items()
    }


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], title: str, path: pathlib.Path) -> None:
    """The curves, and below them each one's ratio to bfloat16."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 5), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    styles = {"float32": ("0.6", "-", 3.0), "bfloat16": ("C0", "-", 1.5), "fp8": ("C1", "--", 1.5)}
    for name, (steps, loss) in curves.items():
        color, line, width = styles[name]
        label = "bfloat16, products in fp8" if name == "fp8" else name
        above.plot(steps, loss, line, color=color, linewidth=width, label=label)
        below.plot(steps, loss / curves["bfloat16"][1], line, color=color, linewidth=width)
    above.set(ylabel="training loss", yscale="log", title=title)
    above.legend()
    below.set(xlabel="step", ylabel="to bfloat16")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    args = options()
    curves, averages = {}, {}
    for name, seed in [*((name, 0) for name in PRECISIONS), *(("float32", seed) for seed in OTHER_SEEDS)]:
        folder = workdir(args, name, seed)
        state = train(run_config(args, name, seed))
        if int(state.step) < args.steps:
            raise SystemExit(f"stopped at step {int(state.step)} of {folder}; the same command goes on")
        averages[folder.name] = jax.device_get(state.ema[0])
        if not seed:
            curves[name] = losses(folder)
    if args.png:
        draw(curves, f"{pathlib.Path(args.config).stem}, {args.steps} steps", args.png)
    in_float32 = losses_in_float32(averages, run_config(args, "float32", 0))
    result = {
        "results": summary(curves, args.steps),
        "averaged_weights_in_float32": in_float32,
        "averaged_weights_to_bfloat16": {name: x / in_float32["bfloat16"] for name, x in in_float32.items()},
    }
    harness.finish(args, result)


if __name__ == "__main__":
    main()
