"""Whether a run can fit its devices at all: what cannot is refused before it is compiled.

The figures are what is certainly held at the same time; `--dry-run` and `--compile-for` tell the whole need.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from dit_jax.config import Config, ConfigError
from dit_jax.memory import device_memory
from dit_jax.models import cost
from dit_jax.training.program import Program
from dit_jax.training.sharding import BATCH_AXES, bytes_per_device


def check_room(config: Config, program: Program) -> None:
    """Raises ConfigError where the training state, or the input of every block, exceeds a device's memory."""
    room, mesh = device_memory(), program.mesh
    if room is None:
        return
    have = f"on each of {mesh.size} devices, which has {room / 1e9:.1f} GB"
    held = _bytes(program.state) + _bytes(program.state.ema[0])  # gradients lie like an average
    if held > room:
        raise ConfigError(
            f"--model.hidden-size {config.model.hidden_size} and --model.depth {config.model.depth} make a training "
            f"state of {held / 1e9:.1f} GB {have}; expected a smaller model, or --mesh.preset fsdp on more devices"
        )
    # Whatever is computed anew in the backward pass, it starts from these.
    compute = dataclasses.replace(config.compute, remat="full")
    t, devices = config.train, math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    images = t.batch_size // devices // program.microbatches
    largest = dataclasses.replace(cost.of_largest(config), compute=compute)
    needed = images * cost.activation_bytes_per_image(largest)
    if needed // mesh.shape["tensor"] > room:
        raise ConfigError(
            f"--train.batch-size is {t.batch_size}: {images} images at once, of {needed / 1e9:.1f} GB or more, "
            f"{have}; expected a smaller one, or a --train.microbatch"
        )


def _bytes(tree: Any) -> int:
    return bytes_per_device(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))
