"""What a run would be on the devices at hand, without training: `python train.py --dry-run`."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.config import Config
from dit_jax.data.metadata import DataError, load_metadata
from dit_jax.devices import peak_flops
from dit_jax.models import cost
from dit_jax.models.compute import resolve_attention
from dit_jax.training.program import abstract_state
from dit_jax.training.sharding import bytes_per_device, check_batch, make_mesh

EXPECTED_MFU = 0.4


def describe_plan(config: Config) -> str:
    """Mesh, memory per device, steps per epoch, checkpoint size and time to the last step, as lines of text.

    Reads nothing but the dataset's metadata and writes nothing. Raises ConfigError as training would.
    """
    mesh, t = make_mesh(config.mesh), config.train
    microbatches = check_batch(t.batch_size, t.microbatch, mesh)
    state = abstract_state(config, mesh)
    parts = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "EMA": state.ema,
        "gradients": state.ema[0],
    }
    memory = {name: _device_bytes(tree) for name, tree in parts.items()}
    images = t.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]) // microbatches
    memory[f"activations of {images} images"] = images * cost.activation_bytes_per_image(
        _here(cost.of_largest(config))
    )
    checkpoint = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    device = jax.devices()[0]
    lines = [
        f"devices         {mesh.size} x {device.device_kind} in {jax.process_count()} process(es)",
        "mesh            " + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        + f", preset {config.mesh.preset}",
        f"batch           {t.batch_size} images: {images} on a device at once, {microbatches} time(s) per step",
        f"parameters      {cost.parameter_count(config) / 1e6:.1f} M",
        f"memory          {sum(memory.values()) / 1e9:.2f} GB per device, of which",
        *(f"                {size / 1e9:8.3f} GB {name}" for name, size in memory.items()),
        f"checkpoint      {checkpoint / 1e9:.2f} GB, {t.keep} newest and the best are kept",
        f"dataset         {_dataset(config)}",
        f"time            {_time(config, mesh.size, device)}",
    ]  # fmt: skip
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit and sum(memory.values()) > limit:
        lines.append(
            f"does not fit    a device has {limit / 1e9:.1f} GB: try --compute.remat full, "
            "--mesh.preset fsdp or a --train.microbatch"
        )
    return "\n".join(lines)


def _here(config: Config) -> Config:
    """The config with the attention that "auto" means on the devices at hand."""
    m, c = config.model, config.compute
    attention: Any = resolve_attention(c.attention, c.dtype, m.num_tokens, m.head_dim)
    return dataclasses.replace(config, compute=dataclasses.replace(c, attention=attention))


def _device_bytes(tree: Any) -> int:
    return bytes_per_device(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))


def _dataset(config: Config) -> str:
    if config.data.mixture:
        total = sum(weight for _, weight in config.data.mixture)
        return f"{len(config.data.mixture)} parts" + "".join(
            f"\n                {weight / total:8.1%} {folder}: {_epochs(config, folder, weight / total)}"
            for folder, weight in config.data.mixture
        )
    return _epochs(config, config.data.dir)


def _epochs(config: Config, folder: str, share: float = 1.0) -> str:
    """How often the run sees a set that is this share of its records."""
    try:
        count = load_metadata(folder).count
    except DataError as error:
        return f"not there yet: {error}"
    per_epoch = count / config.train.batch_size / share
    epochs = config.train.steps / per_epoch
    return (
        f"{count} images, {per_epoch:.1f} steps per epoch, {epochs:.1f} epochs in {config.train.steps} steps"
    )


def _time(config: Config, num_devices: int, device: Any) -> str:
    rate, how = peak_flops(device.device_kind), "of the peak"
    if rate is None:  # virtual CPU devices share one processor: its rate is that of all of them together
        rate, how = (
            _matmul_rate() / (num_devices if device.platform == "cpu" else 1),
            "of a measured matmul's rate",
        )
    work = cost.train_flops_per_image(config) * config.train.batch_size
    seconds = work / (EXPECTED_MFU * rate * num_devices)
    return (
        f"about {seconds * config.train.steps / 3600:.2f} h for {config.train.steps} steps of {seconds:.3g} s, "
        f"at {EXPECTED_MFU:.0%} {how} ({rate * num_devices / 1e12:.3g} TFLOP/s)"
    )


def _matmul_rate(n: int = 1024) -> float:
    """FLOP/s of a float32 matmul on one device, the best of five."""
    matmul = jax.jit(jnp.matmul)
    a = jnp.ones((n, n), jnp.float32)
    matmul(a, a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        matmul(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
