"""From a dataset to sharded batches on the devices, in an order that is a pure function of (seed, step).

Legend: B global batch, n records, M views, h, w latent height and width, c latent channels.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import jax
import numpy as np
import tqdm
from jax.sharding import NamedSharding

from dit_jax.config import ConfigError
from dit_jax.data.latents import LatentDataset

Cache = Literal["none", "ram", "device"]
Batch = dict[str, jax.Array]


# --------------------------------------------------------------------------------------------- order


@functools.lru_cache(maxsize=3)  # a batch may straddle two epochs
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation (n,) of the records, without replacement: a pure function of its arguments.

    Sorting the counter-based generator's raw words keeps the order fixed: NumPy promises the stream of a bit
    generator, but not that of `Generator.permutation`.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # the cache hands the same array to every caller
    return order


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """Records (B,) of the global batch of a step (from 0). Batches straddle epochs, so none is ever left
    out."""
    position = step * batch_size + np.arange(batch_size)
    epoch = position // n
    indices = np.empty(batch_size, np.int64)
    for e in np.unique(epoch):
        here = epoch == e
        indices[here] = epoch_order(seed, int(e), n)[position[here] % n]
    return indices


@dataclass(frozen=True)
class Order:
    """The records (B,) of the batches from `start` on: order[i] is the batch of step start + i."""

    seed: int
    batch_size: int
    n: int
    start: int = 0

    def __getitem__(self, count: int) -> np.ndarray:
        return batch_indices(self.seed, self.start + count, self.batch_size, self.n)


# ------------------------------------------------------------------------------------------- batches


def batches(
    dataset: LatentDataset,
    batch_size: int,
    seed: int,
    start_step: int,
    sharding: NamedSharding,
    cache: Cache = "none",
    workers: int = 0,
) -> Generator[Batch]:
    """Endless batches from `start_step` on: `moments` (B, M, h, w, 2c) and `label` (B,) int32, global arrays.

    sharding splits the batch axis; each process reads only the rows of its own devices. cache holds the whole
    set in host memory ("ram") or on every device ("device"). workers: threads that read ahead, 0 chosen by
    the machine. Close the generator (`contextlib.closing`) to stop its threads.

    Raises ConfigError where the batch does not split over the devices, the set is empty or does not fit.
    """
    if len(dataset) == 0:
        raise ConfigError(f"{dataset!r} is empty; expected at least one record")
    try:
        sharding.shard_shape((batch_size,))
    except ValueError as error:
        raise ConfigError(
            f"--train.batch-size is {batch_size}, which does not split evenly: {error}"
        ) from None
    order = Order(seed, batch_size, len(dataset), start_step)
    if cache == "device":
        return _device_batches(_on_device(dataset, sharding), order, sharding)
    read = _InMemory(dataset).read if cache == "ram" else dataset.read
    return _streamed_batches(_Steps(read, order, local_rows(sharding, batch_size)), sharding, workers)


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, in rising order."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def to_global(rows: np.ndarray, data: np.ndarray, batch_size: int, sharding: NamedSharding) -> jax.Array:
    """The global array (B, ...) of which this process holds `data`, the given rows in rising order."""

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # only asked for on devices of this process
        start, stop, _ = index[0].indices(batch_size)
        here = int(np.searchsorted(rows, start))
        return data[here : here + stop - start]

    return jax.make_array_from_callback((batch_size, *data.shape[1:]), sharding, piece)


@dataclass(frozen=True)
class _Steps:
    """Random access to this process's rows of every batch, as grain wants it."""

    read: Callable[[np.ndarray], dict[str, np.ndarray]]
    order: Order
    rows: np.ndarray

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, count: SupportsIndex) -> dict[str, np.ndarray]:
        return self.read(self.order[count.__index__()][self.rows])


def _streamed_batches(steps: _Steps, sharding: NamedSharding, workers: int) -> Generator[Batch]:
    """Threads read whole batches ahead; one more copies them to the devices, two batches ahead of the step."""
    import grain

    workers = workers or max(2, min(16, os.cpu_count() or 1))  # more of them only wait for each other
    read = grain.MapDataset.source(steps).to_iter_dataset(
        grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers)
    )

    def place(batch: dict[str, np.ndarray]) -> Batch:
        return {
            name: to_global(steps.rows, data, steps.order.batch_size, sharding)
            for name, data in batch.items()
        }

    iterator = iter(grain.experimental.ThreadPrefetchIterDataset(read.map(place), prefetch_buffer_size=2))
    with contextlib.closing(iterator):
        yield from iterator


# --------------------------------------------------------------------------------------------- cache


class _InMemory:
    """The whole set in host memory."""

    def __init__(self, dataset: LatentDataset):
        _require_fits("ram", dataset, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        chunk = max(1, 2**24 // dataset.record_bytes)
        self.data = {
            "moments": np.empty((len(dataset), *dataset.record_shape), dataset.metadata.dtype),
            "label": np.empty(len(dataset), np.int32),
        }
        quiet = jax.process_index() != 0
        with tqdm.tqdm(total=len(dataset), desc="reading the dataset", unit="record", disable=quiet) as bar:
            for start in range(0, len(dataset), chunk):
                rows = np.arange(start, min(start + chunk, len(dataset)))
                for name, value in dataset.read(rows).items():
                    self.data[name][rows] = value
                bar.update(len(rows))

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value[indices] for name, value in self.data.items()}


def _on_device(dataset: LatentDataset, sharding: NamedSharding) -> Batch:
    """The whole set, copied to every device of the mesh."""
    for device in sharding.addressable_devices:
        stats = device.memory_stats() or {}  # type: ignore[attr-defined]
        _require_fits("device", dataset, stats.get("bytes_limit", sys.maxsize) - stats.get("bytes_in_use", 0))
    everywhere = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    data = _InMemory(dataset).data
    return {
        name: jax.make_array_from_callback(value.shape, everywhere, value.__getitem__)
        for name, value in data.items()
    }


def _require_fits(cache: str, dataset: LatentDataset, room: int) -> None:
    size = len(dataset) * dataset.record_bytes
    if size > room:
        raise ConfigError(
            f"--data.cache is {cache}, which needs {size / 1e9:.1f} GB for {dataset!r}, "
            f"but there are {room / 1e9:.1f} GB; expected none or a smaller set"
        )


def _device_batches(data: Batch, order: Order, sharding: NamedSharding) -> Generator[Batch]:
    gather = jax.jit(
        lambda data, rows: {name: value[rows] for name, value in data.items()}, out_shardings=sharding
    )
    for count in itertools.count():
        indices = order[count].astype(np.int32)
        yield gather(data, jax.make_array_from_callback(indices.shape, sharding, indices.__getitem__))
