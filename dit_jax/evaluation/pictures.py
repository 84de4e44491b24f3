"""Sets of pictures to compare with, batch by batch: a source of prepare.py, a prepared dataset, an array.

Legend: N pictures of a set, b of a batch, h and w their sides in pixels.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import ConfigError
from dit_jax.data.crop import CROP
from dit_jax.data.decode import decoded
from dit_jax.data.latents import LatentDataset
from dit_jax.data.sources import Source
from dit_jax.pictures import to_uint8
from dit_jax.runs.workdir import dataset_fingerprint

FEW = 256  # pictures that are decoded sooner than worker processes start


@dataclass(frozen=True)
class Pictures:
    """A set: what it is called in results, what its hash is of, how many there are, and their batches in order."""

    name: str
    identity: str
    count: int
    shape: tuple[int, ...]
    """(N, h, w, 3)."""
    batches: Callable[[int], Iterator[np.ndarray]]
    """Size of a batch -> pictures (b, h, w, 3) uint8, the last batch perhaps smaller."""


def array_pictures(name: str, identity: str, images: np.ndarray) -> Pictures:
    """Pictures (N, h, w, 3) uint8 in memory."""

    def batches(size: int) -> Iterator[np.ndarray]:
        return (images[start : start + size] for start in range(0, len(images), size))

    return Pictures(name, identity, len(images), images.shape, batches)


def source_pictures(source: Source, side: int) -> Pictures:
    """A source's pictures as prepare.py takes them: the centre square, `side` pixels wide.

    Reading raises ConfigError, naming the record, for a picture that cannot be decoded.
    """
    count = len(source)

    def batches(size: int) -> Iterator[np.ndarray]:
        workers = 0 if source.in_memory or count < FEW else max(1, (os.cpu_count() or 2) - 1)
        batch: list[np.ndarray] = []
        with decoded(source, range(count), side, workers) as examples:
            for example in examples:
                if example.image is None:
                    raise ConfigError(
                        f"--reference {source.name}: {example.id} cannot be decoded: {example.problem}"
                    )
                batch.append(example.image)
                if len(batch) == size:
                    yield np.stack(batch)
                    batch = []
        if batch:
            yield np.stack(batch)

    identity = f"{source.name} {source.fingerprint()} {CROP} {side}"
    return Pictures(source.name, identity, count, (count, side, side, 3), batches)


def dataset_pictures(folder: pathlib.Path, vae: str | None = None) -> Pictures:
    """The pictures of a prepared dataset, decoded from the posterior's means: no better than its autoencoder is.

    vae: where the autoencoder lies now, if it has moved. Raises ConfigError for no dataset, or another autoencoder.
    """
    from dit_jax.interop.diffusers import load_autoencoder_kl, weights_hash

    dataset = LatentDataset(folder, mirror=False)
    metadata, place = dataset.metadata, vae or dataset.metadata.vae
    try:
        found = weights_hash(place)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--reference {folder}: its autoencoder cannot be read: {error}") from None
    if found != metadata.vae_hash:
        raise ConfigError(
            f"--reference {folder} was encoded by weights {metadata.vae_hash[:12]}; {place} has weights {found[:12]}"
        )

    def batches(size: int) -> Iterator[np.ndarray]:
        model, params = load_autoencoder_kl(place)
        mesh = Mesh(np.array(jax.local_devices()), ("batch",))
        split, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
        placed = jax.device_put(params, whole)
        size += -size % mesh.size

        def decode(params: Any, z: jax.Array) -> Any:
            return model.apply({"params": params}, z, method="decode")

        jitted = jax.jit(decode, in_shardings=(whole, split), out_shardings=split)
        for start in range(0, len(dataset), size):
            rows = np.arange(start, start + size)
            moments = dataset.read(np.minimum(rows, len(dataset) - 1))["moments"][:, 0]
            mean = np.split(moments.astype(np.float32), 2, axis=-1)[0]
            yield to_uint8(np.asarray(jitted(placed, mean)))[: len(dataset) - start]

    side, count = metadata.image_size, len(dataset)
    identity = f"{metadata.source} {dataset_fingerprint(metadata)}"
    return Pictures(f"{metadata.source} decoded", identity, count, (count, side, side, 3), batches)
