"""What the benchmarks share: options, networks with weights that matter, times, results as JSON.

Every script first checks that what it will time computes the same as the plain float32 path, and stops if not.
Nothing here needs more than JAX, Flax, Optax and NumPy.

Letters: B batch, M views of an image, h w c latent.
"""

from __future__ import annotations

from dit_jax.memory import keep_freed_memory

keep_freed_memory()  # as train.py and sample.py do, before NumPy and JAX start threads

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import workers

from dit_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    model_sizes,
)
from dit_jax.devices import peak_flops

SCALING_FACTOR = 0.18215  # Stable Diffusion's autoencoder
# Relative L2 error to plain float32. tf32 keeps three bits more than bfloat16: a margin of one is left.
TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 4e-2, "fp8": 1e-1}


# -------------------------------------------------------------------------------------------- options


def parser(description: str, rounds: int = 10) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    new = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    new.add_argument("--out", type=pathlib.Path, help="JSON file of the result")
    new.add_argument("--rounds", type=int, default=rounds, help="timed rounds; medians are reported")
    return new


def add_model_options(new: argparse.ArgumentParser, model: str, batch_size: int) -> None:
    """Options that choose a network and how it computes."""
    new.add_argument("--model", default=model, help="family member, such as DiT-XL/2")
    new.add_argument("--latent-size", type=int, default=32, help="side of the latent (image side / 8)")
    new.add_argument("--depth", type=int, help="layers, where not the family's")
    new.add_argument("--hidden-size", type=int, help="width, where not the family's")
    new.add_argument("--num-heads", type=int, help="heads, where not the family's")
    new.add_argument("--batch-size", type=int, default=batch_size)
    new.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute precision")
    kernels = ("auto", "einsum", "tokens_last", "tokens_last_by_head", "xla", "cudnn")
    new.add_argument("--attention", default="auto", choices=kernels)
    new.add_argument("--norm-kernel", default="xla", choices=("xla", "pallas"), help="for adaLN")
    new.add_argument("--unroll", action=argparse.BooleanOptionalAction, default="auto", help="the layers")
    add_product_option(new)


def add_product_option(new: argparse.ArgumentParser) -> None:
    """The option that `set_products` and `torch_peer.set_products` take."""
    new.add_argument("--float32-products", default="tf32", choices=("tf32", "float32"),
                     help="how a GPU multiplies what is float32, on both sides")  # fmt: skip


def make_config(args: argparse.Namespace, **train: Any) -> Config:
    """The resolved config of the options above; `train` replaces fields of TrainConfig."""
    sizes = dict(
        zip(("depth", "hidden_size", "num_heads", "patch_size"), model_sizes(args.model), strict=True)
    )
    given = {name: getattr(args, name) for name in ("depth", "hidden_size", "num_heads")}
    sizes |= {name: value for name, value in given.items() if value}
    compute = ComputeConfig(
        dtype=args.dtype, quantization=getattr(args, "quantization", "none"), attention=args.attention,
        norm_kernel=args.norm_kernel, remat=getattr(args, "remat", "none"), unroll=args.unroll,
    )  # fmt: skip
    return Config(
        model=ModelConfig(name=args.model, input_size=(args.latent_size, args.latent_size), **sizes),
        compute=compute,
        data=DataConfig(dir="synthetic", mirror=False),
        optim=OptimConfig(),
        train=TrainConfig(batch_size=args.batch_size, **train),
    )


def plain(config: Config) -> tuple[Any, Config]:
    """The same network computed plainly in float32, and the config that says so."""
    from dit_jax.models.create import build_model

    config = dataclasses.replace(config, compute=ComputeConfig(unroll=False))
    return build_model(config).plain(), config


def set_products(args: argparse.Namespace) -> None:
    """--float32-products for JAX. A CPU has one way only."""
    if jax.default_backend() == "gpu":
        names = {"tf32": "tensorfloat32", "float32": "highest"}
        jax.config.update("jax_default_matmul_precision", names[args.float32_products])


def tolerance(args: argparse.Namespace) -> float:
    """The largest error of what the options ask for."""
    if getattr(args, "quantization", "none") != "none":
        return TOLERANCE[args.quantization]
    rounded = args.dtype == "float32" and jax.default_backend() == "gpu"
    return TOLERANCE[args.float32_products if rounded else args.dtype]


# --------------------------------------------------------------------------------------- work to time


def random_params(params: Any, seed: int = 0) -> Any:
    """Parameters with noise added: a fresh network's gates are zero, and would hide any error in a block."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noisy = [x + 0.02 * rng.standard_normal(x.shape, np.float32) for x in map(np.asarray, leaves)]
    return jax.tree.unflatten(tree, noisy)


def synthetic_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Moments (B, M, h, w, 2c) float16 and labels (B,), as a loader gives them."""
    m, b = config.model, config.train.batch_size
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal((b, 1, *m.input_size, m.in_channels)) / SCALING_FACTOR
    moments = np.concatenate([mean, np.full_like(mean, 0.1)], axis=-1).astype(np.float16)
    return {"moments": moments, "label": rng.integers(m.num_classes, size=b, dtype=np.int32)}


def relative_error(found: Any, expected: Any) -> float:
    """|found - expected| / |expected| over all leaves, in float64 on the host."""
    pairs = [
        (np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    a, b = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check(name: str, error: float, tolerance: float) -> dict[str, float]:
    """The error for the result; ends the script where it is too large to time anything."""
    if not error <= tolerance:
        sys.exit(f"{name}: relative error {error:.2e}, expected at most {tolerance:.0e}: not timed")
    return {name: error}


def check_training(model: Any, process: Any, config: Config, params: Any, limit: float) -> dict[str, float]:
    """Errors of the loss and of its gradient against the plain path, on up to 4 images, at given draws."""
    m, b = config.model, min(config.train.batch_size, 4)
    rng = np.random.default_rng(1)
    x0, noise = rng.standard_normal((2, b, *m.input_size, m.in_channels), np.float32)
    t, y = np.linspace(1, 999, b).astype(np.int32), np.arange(b, dtype=np.int32) % m.num_classes

    def gradient_of(network: Any) -> Any:
        def loss(p: Any) -> jax.Array:
            def denoise(x: jax.Array, t: jax.Array) -> Any:
                return network.apply({"params": p}, x, t, y)

            return process.training_losses(denoise, jnp.asarray(x0), jnp.asarray(t), jnp.asarray(noise))[
                "loss"
            ].mean()

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))

    loss, grads = gradient_of(model)
    with jax.default_matmul_precision("highest"):
        expected_loss, expected = gradient_of(plain(config)[0])
    return check("loss", relative_error(loss, expected_loss), limit) | check(
        "gradient", relative_error(grads, expected), limit
    )


# --------------------------------------------------------------------------------------------- timing


def in_turns(work: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each piece of work, run in turns A B A B, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(warmup + rounds):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def summary(
    times: Mapping[str, list[float]],
    images: int,
    first: str = "jax",
    cpu_times: Mapping[str, list[float]] | None = None,
) -> dict[str, Any]:
    """Median, fastest and images/s of each; the ratio of `first` to each other is the median over rounds.

    With CPU seconds also their ratio, which other work on the machine changes less.
    """
    result: dict[str, Any] = {}
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        result[name] = {"median_s": middle, "fastest_s": min(seconds), "images_per_s": images / middle}
        if name != first and first in times:
            result[name]["time_ratio"] = _median_ratio(times[first], seconds)
            result[name]["time_ratio_of_fastest"] = min(times[first]) / min(seconds)
            if cpu_times and all(cpu_times[name]):
                result[name]["cpu_time_ratio"] = _median_ratio(cpu_times[first], cpu_times[name])
    return result


def _median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def utilisation(flops_per_image: float, images_per_s: float, device_kind: str) -> dict[str, float]:
    """TFLOP/s, and the share of the device's bfloat16 peak where that is known."""
    achieved = flops_per_image * images_per_s
    peak = peak_flops(device_kind)
    return {"tflops": achieved / 1e12} | ({"mfu": achieved / peak} if peak else {})


# --------------------------------------------------------------------------------------------- result


def environment() -> dict[str, Any]:
    """Device, versions and flags that a figure belongs to."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "optax", "torch", "diffusers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "peak_device_bytes": memory,
    }


def finish(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print the result with its options and environment (by default this process's), and write it to --out."""
    values = {name: value for name, value in vars(args).items() if name not in ("side", "exchange", "child")}
    options = {name: str(v) if isinstance(v, pathlib.Path) else v for name, v in values.items()}
    place = result.get("environment") or environment()
    full = {"benchmark": pathlib.Path(sys.argv[0]).name, "options": options, **result, "environment": place}
    text = json.dumps(full, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


def compare(
    args: argparse.Namespace,
    sides: Sequence[workers.Side],
    images: int,
    flops_per_image: float,
    warmup: int = 1,
    reference: bool = False,
    works: Sequence[str] = ("round",),
) -> None:
    """Time the sides in turns and finish; images: of one round. The ratio that counts is to the fastest peer."""
    result: dict[str, Any] = {"correctness": {}, "sides": {}}
    with workers.started(args, sides, reference) as ready:
        for worker in ready:
            errors = worker.facts.pop("correctness", {})
            result["correctness"] |= errors
            result["sides"][worker.side.name] = worker.facts
        found = {}
        for work in works:
            measured = workers.in_turns(ready, work, args.rounds, warmup)
            found[work] = summary(measured.times, images, cpu_times=measured.cpu_times)
            if peer := workers.fastest_peer(measured.times):
                fastest = {"fastest_peer": peer}
                if "jax" in measured.times:
                    fastest["time_ratio"] = found[work][peer]["time_ratio"]
                result.setdefault("peer", {})[work] = fastest
            result["waiting_cores"] = max(measured.waiting_cores, result.get("waiting_cores", 0.0))
        result["environment"] = ready[0].ask(workers.ENVIRONMENT)
    if flops_per_image:
        for line in (line for lines in found.values() for line in lines.values()):
            kind = result["environment"]["device"]
            line |= utilisation(flops_per_image, line["images_per_s"], kind)
    if len(works) == 1:
        found = found[works[0]]
        result["peer"] = result.get("peer", {}).get(works[0])
    finish(args, result | {"results": found})
