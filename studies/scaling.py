"""The claims of the DiT paper (arXiv 2212.09748), tried on a family of networks that are trained alike.

    python studies/scaling.py --out runs/scaling
    python studies/scaling.py --config configs/dit_xl2_imagenet256.py --sizes S B L XL --patches 8 4 2 \\
        --conditioning-at XL/2 --seeds 1 --steps 400000 --points 8 --learning-rate 1e-4 --samples 50000 \\
        --sampler ddpm --sampling-steps 250 --reference VIRTUAL_imagenet256_labeled.npz --out runs/scaling_imagenet \\
        --data.dir /data/imagenet256 --compute.dtype bfloat16

Trains every size at every patch size, and the four conditionings at one size, with each seed; measures the averaged
weights at equal intervals, without guidance, as the paper does; and draws quality against steps, against the
arithmetic of a forward pass, against parameters, and against the arithmetic of the training. A size is a width, with
--depth blocks, or a letter of the paper's table; further options are train.py's, for all runs. The runs are the
trainer's own, each in a folder below --out; the same command goes on where it was stopped. Tables and pictures are
drawn anew after every run, from what there is. Several processes join as those of train.py do.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import figures
import jax
import tqdm
from quality import quality_of

from dit_jax.compiler import keep_compiled_programs
from dit_jax.config import Config, ConfigError, parse_args, resolve
from dit_jax.models import cost
from dit_jax.processes import end, on_lead
from dit_jax.training import launch
from dit_jax.training.loop import train

CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")
HEAD_CHANNELS = 16


@dataclass(frozen=True)
class Member:
    """A network of the family, in one of its runs."""

    size: str
    patch_size: int
    conditioning: str
    seed: int

    @property
    def model(self) -> str:
        """The network's name, without its seed."""
        name = f"{self.size}/{self.patch_size}"
        return name if self.conditioning == CONDITIONINGS[0] else f"{name} {self.conditioning}"

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.size}_{self.patch_size}_{self.conditioning}_seed{self.seed}"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--config", default="configs/digits.py", help="recipe of all runs")
    add("--sizes", nargs="+", default=["24", "32", "48", "64"], help="widths, or letters: S B L XL")
    add("--patches", nargs="+", type=int, default=[4, 2, 1], help="patch sizes")
    add("--depth", type=int, default=4, help="blocks of a network that is named by its width")
    add(
        "--conditioning-at",
        default="64/2",
        help="size and patch size at which the conditionings are compared",
    )
    add("--seeds", type=int, default=3, help="runs of each network")
    add("--steps", type=int, default=400, help="steps of each run")
    add("--points", type=int, default=4, help="measurements of each run")
    add("--learning-rate", type=float, default=4e-3, help="constant after the recipe's warm-up, for all")
    add("--samples", type=int, default=1000, help="pictures in a measurement")
    add("--sampler", default="unipc_2", help="sampler of the measurements")
    add("--sampling-steps", type=int, default=8, help="its steps")
    add("--reference", help="what samples are compared with, as of evaluate.py (default: the digits)")
    add("--split", default="test", help="split of a reference that has several")
    add("--inception", help="file of the Inception weights, for a reference that is not the digits")
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/scaling"),
        help="folder of runs, tables, pictures",
    )
    add("--only-draw", action="store_true", help="train nothing: tables and pictures of what there is")
    join, rest, _ = launch.parse_join(program="scaling.py")
    args, of_training = parser.parse_known_args(rest)
    args.join = join
    if args.points < 1 or args.steps % args.points:
        parser.error(f"--steps is {args.steps}; expected a multiple of --points, {args.points}")
    if args.seeds < 1:
        parser.error(f"--seeds is {args.seeds}; expected 1 or more")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the pictures need matplotlib; expected it to be installed")
    args.recipe = parse_args(["--config", args.config, *of_training], program="scaling.py")
    return args


def family(args: argparse.Namespace) -> Iterator[Member]:
    """All runs, seed by seed: the first third of the time gives every network once."""
    size, patch = args.conditioning_at.split("/")
    for seed in range(args.seeds):
        for patch_size in args.patches:
            for width in args.sizes:
                yield Member(width, patch_size, CONDITIONINGS[0], seed)
        for conditioning in CONDITIONINGS[size in args.sizes and int(patch) in args.patches :]:
            yield Member(size, int(patch), conditioning, seed)


def config_of(member: Member, args: argparse.Namespace) -> Config:
    """The recipe with this network, seed and length; a ConfigError names what does not fit."""
    recipe = args.recipe
    size: dict[str, Any] = {"name": f"DiT-{member.size}/{member.patch_size}", "depth": None, "hidden_size": None,
                            "num_heads": None, "patch_size": None}  # fmt: skip
    if member.size.isdecimal():
        width = int(member.size)
        heads = max(1, width // HEAD_CHANNELS)
        size |= {"name": f"DiT-S/{member.patch_size}", "depth": args.depth, "hidden_size": width,
                 "num_heads": heads}  # fmt: skip
    every = args.steps // args.points
    run: dict[str, Any] = {
        "workdir": str(args.out / member.folder), "seed": recipe.train.seed + member.seed, "steps": args.steps,
        "checkpoint_every": every, "milestone_every": every, "keep": 1, "sample_every": 0, "log_every": every,
    }  # fmt: skip
    optim = {"learning_rate": args.learning_rate, "schedule": "constant"}
    return resolve(
        dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, conditioning=member.conditioning, **size),
            optim=dataclasses.replace(recipe.optim, **optim),
            train=dataclasses.replace(recipe.train, **run),
        )
    )


def measure(member: Member, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line for each measurement of a run; trains it, and measures, what is not there yet."""
    config = config_of(member, args)
    file = args.out / member.folder / "quality.jsonl"
    text = on_lead(lambda: file.read_text() if file.is_file() else "")
    lines = [json.loads(line) for line in text.splitlines()]
    asked = {"samples": args.samples, "sampler": args.sampler, "sampling_steps": args.sampling_steps}
    done = {line["step"]: line for line in lines if line.items() >= asked.items()}
    points = range(args.steps // args.points, args.steps + 1, args.steps // args.points)
    if args.only_draw or all(step in done for step in points):
        return [done[step] for step in points if step in done]
    start = time.monotonic()
    state = train(config)
    if int(state.step) < args.steps:
        raise SystemExit(f"stopped at step {int(state.step)} of {member.folder}; the same command goes on")
    known = {"macs": cost.forward_macs(config), "parameters": cost.parameter_count(config)}
    known["seconds"] = round(time.monotonic() - start, 1)
    known["training_macs"] = 3 * known["macs"] * config.train.batch_size  # of a step
    for step in points:
        if step not in done:
            done[step] = {"step": step, **asked, **quality_of(config, step, args), **known}
            if jax.process_index() == 0:
                with file.open("a") as out:
                    out.write(json.dumps(done[step]) + "\n")
    return [done[step] for step in points]


def main() -> None:
    keep_compiled_programs()
    try:
        args = options()
        launch.initialize(args.join)
        lead = jax.process_index() == 0
        members = list(family(args))
        for member in members:
            config_of(member, args)  # what does not fit is said before hours of training
        found: dict[Member, list[dict[str, Any]]] = {}
        with tqdm.tqdm(members, unit="run", position=1, disable=args.only_draw or not lead) as bar:
            for member in bar:
                bar.set_description(member.folder)
                if lines := measure(member, args):
                    found[member] = lines
                if lead and lines:
                    figures.draw(found, args.out, pathlib.Path(args.config).stem)
    except ConfigError as error:
        raise SystemExit(end(launch.EXIT_BAD_OPTION, f"scaling.py: {error}")) from None
    if lead:
        print(figures.table(found) if found else f"{args.out} holds no measurements")


if __name__ == "__main__":
    main()
