"""How compile time, host memory, step time and memory per device grow with depth and devices.

    python benchmarks/scaling.py --out runs/scaling.json --png runs/scaling.png

Three questions, each answered by processes of their own: compile time and peak host memory against depth, with the
loop over layers rolled and unrolled; step time against the number of virtual CPU devices at fixed total work (the
cores stay the same, so that flat is ideal); memory per chip of a step compiled for TPU meshes (libtpu, no TPU) at a
fixed number of images a chip.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

import harness
import tqdm

HERE = pathlib.Path(__file__).resolve().parent


def options() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0], rounds=3)
    harness.add_model_options(parser, "DiT-S/4", 16)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 12], help="layers to compile")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="virtual CPU devices")
    parser.add_argument("--topologies", nargs="*", default=["v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"])
    parser.add_argument("--images-per-chip", type=int, default=8)
    parser.add_argument("--remat", default="none", choices=("none", "full", "dots", "dots_attention"))
    parser.add_argument("--png", type=pathlib.Path, help="picture of the curves")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------------------------- what a child does


def child(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one point."""
    question, _, value = args.child.partition(" ")
    if question == "topology":
        return chip_memory(args, value)
    import jax

    from dit_jax.config import MeshConfig
    from dit_jax.training.program import build_program
    from dit_jax.training.sharding import batch_sharding, make_mesh

    config, mesh = harness.make_config(args), make_mesh(MeshConfig())
    program = build_program(config, mesh, scaling_factor=harness.SCALING_FACTOR, shift_factor=0.0)
    batch = jax.device_put(harness.synthetic_batch(config), batch_sharding(mesh))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    step = program.step.lower(program.state, batch).compile()
    compile_s = time.perf_counter() - start
    found = {
        "compile_s": compile_s,
        "host_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "host_mb_before": before / 1024,
    }
    if question == "devices":
        state = program.init()

        def run() -> None:
            nonlocal state
            state, metrics = step(state, batch)
            float(metrics["loss"])

        times = harness.in_turns({"jax": run}, args.rounds)
        found |= harness.summary(times, args.batch_size)["jax"]
    return found


def chip_memory(args: argparse.Namespace, topology: str) -> dict[str, Any]:
    """Bytes per chip of the step under fsdp over all chips."""
    import dataclasses

    from dit_jax.config import MeshConfig
    from dit_jax.planning.compile_for import compile_training
    from dit_jax.planning.topology import topology_devices

    _, devices = topology_devices(topology)
    args.batch_size, args.dtype = args.images_per_chip * len(devices), "bfloat16"
    mesh = MeshConfig(preset="fsdp", data=1, fsdp=len(devices))
    report = compile_training(dataclasses.replace(harness.make_config(args), mesh=mesh), topology)
    return {
        "chips": len(devices),
        "total_mb": report.total_bytes / 2**20,
        "state_mb": sum(report.arguments.values()) / 2**20,
        "temporaries_mb": report.memory["temporaries"] / 2**20,
        "compile_s": report.compile_seconds,
    }


# ------------------------------------------------------------------------------------------- the parent


def ask(question: str, *more: str, devices: int = 1) -> dict[str, Any]:
    """The answer of a child with these further options."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags.strip(), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "scaling.py"), *sys.argv[1:], *more, "--child", question]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{question}: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = options()
    if args.child:
        print(json.dumps(child(args)))
        return
    questions: list[tuple[str, Any, tuple[str, ...], int]] = [
        (how, depth, ("--depth", str(depth), "--unroll" if how == "unrolled" else "--no-unroll"), 1)
        for depth in args.depths
        for how in ("scan", "unrolled")
    ]
    questions += [("devices", n, (), n) for n in args.devices]
    questions += [(f"topology {name}", name, (), 1) for name in args.topologies]
    result: dict[str, dict[str, Any]] = {"scan": {}, "unrolled": {}, "devices": {}, "topology": {}}
    for question, point, more, devices in tqdm.tqdm(questions, unit="point"):
        result[question.partition(" ")[0]][str(point)] = ask(question, *more, devices=devices)
    if args.png:
        draw(result, args.png)
    harness.finish(args, {"results": result})


def draw(result: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """The curves of the three questions, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (compiling, memory, stepping, chips) = plt.subplots(1, 4, figsize=(17, 3.8), layout="constrained")
    for how in ("scan", "unrolled"):
        depths = [int(n) for n in result[how]]
        points = result[how].values()
        compiling.plot(depths, [p["compile_s"] for p in points], "o-", label=how)
        memory.plot(depths, [p["host_mb"] - p["host_mb_before"] for p in points], "o-", label=how)
    for axes, label in ((compiling, "compile time (s)"), (memory, "host memory of the compilation (MB)")):
        axes.set(xlabel="layers", ylabel=label, ylim=(0, None))
        axes.legend()
    counts = [int(n) for n in result["devices"]]
    stepping.plot(counts, [p["median_s"] for p in result["devices"].values()], "o-")
    stepping.set(xlabel="virtual CPU devices, same work", ylabel="step (s)", ylim=(0, None))
    points = result["topology"].values()
    for name in ("total_mb", "state_mb", "temporaries_mb"):
        chips.plot([p["chips"] for p in points], [p[name] for p in points], "o-", label=name[:-3])
    chips.set(
        xlabel="chips, same images on each", ylabel="memory per chip (MiB)", xscale="log", ylim=(0, None)
    )
    chips.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
