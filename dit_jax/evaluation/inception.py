"""The Inception network as an extractor of features, on all devices of this process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.evaluation.features import FeatureExtractor
from dit_jax.interop.inception import find_inception, load_inception
from dit_jax.models.inception import Convention, Inception, network_input

BATCH = 32  # pictures that one device takes at once


def inception_extractor(
    path: str | None, convention: Convention = "adm", batch_size: int | None = None
) -> FeatureExtractor:
    """The network of the weights in `path`, or else $DIT_JAX_INCEPTION; of any size of pictures.

    batch_size: pictures at once at most, rounded up to the devices (default: 32 a device).
    Computes in float32, products too. Raises ConfigError where there are no weights or they do not fit.
    """
    variables, found = load_inception(find_inception(path))
    split, whole, network = _network()
    variables = jax.device_put(variables, whole)
    resize = jax.jit(
        lambda images: network_input(images, convention), in_shardings=split, out_shardings=split
    )
    devices = jax.local_device_count()
    size = batch_size or BATCH * devices
    size += -size % devices

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        batches = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            full = devices  # doubled: few sizes to compile for, and few pictures that fill up
            while full < len(batch):
                full *= 2
            filled = np.pad(batch, [(0, min(full, size) - len(batch)), (0, 0), (0, 0), (0, 0)])
            out = network(variables, resize(jax.device_put(filled, split)))
            batches.append({name: np.asarray(values)[: len(batch)] for name, values in out.items()})
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    return FeatureExtractor("inception", convention, found, run)


@functools.cache  # both conventions share its compiled program
def _network() -> tuple[NamedSharding, NamedSharding, Callable[..., Any]]:
    """(how a batch lies on this process's devices, how variables do, the jitted network)."""
    mesh = Mesh(np.array(jax.local_devices()), ("batch",))
    split, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())

    def features(variables: Any, x: jax.Array) -> Any:
        # On an accelerator float32 convolutions would otherwise run in TF32 or bfloat16.
        with jax.default_matmul_precision("highest"):
            return Inception().apply(variables, x)

    return split, whole, jax.jit(features, in_shardings=(whole, split), out_shardings=split)
