"""Seconds from the start of a process to its first training step or first samples, without and with compiled programs
from an earlier one.

    python benchmarks/compile.py --model DiT-S/2 --batch-size 8

Every start is a process of its own with an empty folder for compiled programs, then again with that folder filled.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import harness
import tqdm

HERE = pathlib.Path(__file__).resolve().parent


def options() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0], rounds=2)
    harness.add_model_options(parser, "DiT-S/2", 8)
    parser.add_argument("--remat", default="none", choices=("none", "full", "dots", "dots_attention"))
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--cfg-scale", type=float, default=1.5, help="guidance scale")
    parser.add_argument("--child", choices=("train", "sample"), help=argparse.SUPPRESS)
    return parser.parse_args()


def first_step(args: argparse.Namespace) -> None:
    """What the process under test does."""
    import jax
    import numpy as np

    from dit_jax.config import MeshConfig
    from dit_jax.training.program import build_program
    from dit_jax.training.sharding import batch_sharding, make_mesh

    config = harness.make_config(args)
    mesh = make_mesh(MeshConfig())
    program = build_program(config, mesh, scaling_factor=harness.SCALING_FACTOR, shift_factor=0.0)
    state = jax.block_until_ready(program.init())
    if args.child == "train":
        batch = jax.device_put(harness.synthetic_batch(config), batch_sharding(mesh))
        _, metrics = program.step(state, batch)
        assert np.isfinite(float(metrics["loss"]))
        return
    from sample import jax_loop

    labels = np.zeros(args.batch_size, np.int32)
    assert np.isfinite(jax_loop(args, program.model, config, args.steps)(state.params, labels)).all()


def seconds(child: str, cache: str) -> float:
    """Time of one process from its start to its end."""
    environment = {
        **os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(HERE.parent),
    }  # fmt: skip
    start = time.perf_counter()
    command = [sys.executable, str(HERE / "compile.py"), *sys.argv[1:], "--child", child]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{child}: {done.stderr[-500:]}")
    return time.perf_counter() - start


def main() -> None:
    args = options()
    if args.child:
        return first_step(args)
    times: dict[str, dict[str, list[float]]] = {
        child: {"cold": [], "warm": []} for child in ("train", "sample")
    }
    for _ in tqdm.trange(args.rounds, desc="rounds"):
        for child, found in times.items():
            with tempfile.TemporaryDirectory() as cache:
                found["cold"].append(seconds(child, cache))
                found["warm"].append(seconds(child, cache))
    result: dict[str, Any] = {}
    for child, found in times.items():
        ratios = [warm / cold for warm, cold in zip(found["warm"], found["cold"], strict=True)]
        result[child] = {f"{name}_s": statistics.median(values) for name, values in found.items()}
        result[child]["warm_to_cold"] = statistics.median(ratios)
    result["imports_s"] = import_seconds()
    harness.finish(args, {"results": result})


def import_seconds() -> float:
    """Time of a process that imports jax and looks at the devices: no start is quicker."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
