"""From a dataset to sharded batches on the devices, in an order that is a pure function of (seed, step).

Legend: B global batch, n records, M views, h, w latent height and width, c latent channels.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pathlib
import platform
import sys
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import jax
import numpy as np
import tqdm
from jax.sharding import NamedSharding

from dit_jax.config import ConfigError
from dit_jax.data.captions import CaptionTable
from dit_jax.data.captions import gather as gather_captions
from dit_jax.data.latents import LatentDataset
from dit_jax.data.mixture import Mixture
from dit_jax.data.order import KEYED_FROM as KEYED_FROM
from dit_jax.data.order import MixedOrder, Order, OrderKind, whole_weights
from dit_jax.data.order import batch_indices as batch_indices
from dit_jax.data.order import epoch_order as epoch_order
from dit_jax.data.order import keyed_order as keyed_order
from dit_jax.data.order import order_kind as order_kind
from dit_jax.memory import host_memory

Cache = Literal["none", "ram", "device"]
Batch = dict[str, jax.Array]
Dataset = LatentDataset | Mixture
AnyOrder = Order | MixedOrder

BATCHES_PLACED = 2  # on the devices, ahead of the step


# ------------------------------------------------------------------------------------------- batches


def batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    start_step: int,
    sharding: NamedSharding,
    cache: Cache = "none",
    workers: int = 0,
    kind: OrderKind | Sequence[OrderKind] = "sorted",
) -> Generator[Batch]:
    """Endless batches from `start_step` on: `moments` (B, M, h, w, 2c) and the condition, global arrays.

    sharding splits the batch axis; each process reads only the rows of its own devices. cache holds the whole
    set in host memory ("ram") or on every device ("device"). workers: threads that read ahead, 0 chosen by
    the machine. kind: the order of an epoch, with which a run goes on as it began; of a mixture each part's. Close
    the generator (`contextlib.closing`) to stop its threads.

    Raises ConfigError where the batch does not split over the devices, the set is empty, or set or batches do not
    fit into memory.
    """
    for part in dataset.parts:
        if len(part) == 0:
            raise ConfigError(f"{part!r} is empty; expected at least one record")
    try:
        sharding.shard_shape((batch_size,))
    except ValueError as error:
        raise ConfigError(
            f"--train.batch-size is {batch_size}, which does not split evenly: {error}"
        ) from None
    check_memory(dataset, batch_size, cache, workers)
    order = order_of(dataset, batch_size, seed, start_step, kind)
    if cache == "device":
        return _device_batches(dataset, order, sharding)
    read = _in_memory(dataset) if cache == "ram" else dataset.read
    rows = local_rows(sharding, batch_size)
    steps = _Steps(read, order, rows, dataset.conditions.of_text)
    return _streamed_batches(steps, sharding, workers)


def order_of(
    dataset: Dataset, batch_size: int, seed: int, start: int, kind: OrderKind | Sequence[OrderKind]
) -> AnyOrder:
    """The order of the batches of a dataset from step `start` on."""
    if isinstance(dataset, Mixture):
        kinds = (kind,) * len(dataset.parts) if isinstance(kind, str) else tuple(kind)
        sizes = tuple(map(len, dataset.parts))
        run = batch_size if dataset.several_sizes else 1
        return MixedOrder(seed, batch_size, sizes, whole_weights(dataset.weights), start, kinds, run)
    assert isinstance(kind, str)
    return Order(seed, batch_size, len(dataset), start, kind)


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

    read: Callable[..., dict[str, np.ndarray]]
    order: AnyOrder
    rows: np.ndarray
    of_text: bool

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, count: SupportsIndex) -> dict[str, np.ndarray]:
        step = count.__index__()
        drawn = [self.order.words(step)[self.rows]] if self.of_text else []
        return self.read(self.order[step][self.rows], *drawn)


def _streamed_batches(steps: _Steps, sharding: NamedSharding, workers: int) -> Generator[Batch]:
    """Threads read whole batches ahead; one more copies them to the devices, two batches ahead of the step."""
    import grain

    workers = _readers(workers)
    read = grain.MapDataset.source(steps).to_iter_dataset(
        grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers)
    )

    def place(batch: dict[str, np.ndarray]) -> Batch:
        return {
            name: to_global(steps.rows, data, steps.order.batch_size, sharding)
            for name, data in batch.items()
        }

    iterator = iter(
        grain.experimental.ThreadPrefetchIterDataset(read.map(place), prefetch_buffer_size=BATCHES_PLACED)
    )
    with contextlib.closing(iterator):
        yield from iterator


def _readers(workers: int) -> int:
    """Threads that read ahead."""
    return workers or max(2, min(16, os.cpu_count() or 1))  # more of them only wait for each other


# -------------------------------------------------------------------------------------------- memory


def check_memory(dataset: Dataset, batch_size: int, cache: Cache = "none", workers: int = 0) -> None:
    """Raise ConfigError where the set that is cached, or the batches read ahead, are more than a host's memory.

    Every process holds its own copy of a cached set, so those of a host are counted together. All processes of a
    run must call this, and all get the same answer.
    """
    size = set_bytes(dataset)
    copies = {"none": 0, "ram": 1, "device": 1}[cache]
    if cache == "device" and jax.default_backend() == "cpu":
        copies += jax.local_device_count()  # whose memory is the host's
    share = -(-batch_size // jax.process_count()) * (dataset.record_bytes + dataset.conditions.sample_bytes)
    ahead = 0 if cache == "device" else _readers(workers) + BATCHES_PLACED
    processes, room = _host()
    in_all = f" in {processes} processes on a host" if processes > 1 else ""
    if size * copies * processes > room:
        raise ConfigError(
            f"--data.cache is {cache}, which needs {size * copies * processes / 1e9:.1f} GB for {dataset!r}{in_all}, "
            f"but there are {room / 1e9:.1f} GB; expected none or a smaller set"
        )
    if share * ahead * processes > room:
        raise ConfigError(
            f"--train.batch-size is {batch_size}, of which {ahead} are in memory at once: "
            f"{share * ahead * processes / 1e9:.1f} GB{in_all}, but there are "
            f"{room / 1e9:.1f} GB; expected a smaller batch"
        )


def set_bytes(dataset: Dataset) -> int:
    """Bytes of a whole set as a cache holds it."""
    of_moments = sum(len(part) * part.record_bytes for part in dataset.parts)
    return of_moments + dataset.conditions.cached_bytes


def _host() -> tuple[int, int]:
    """(processes of this run, bytes of memory) of the host with the least memory for each of its processes."""
    if jax.process_count() == 1:
        return 1, host_memory()
    from jax.experimental import multihost_utils

    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()  # two hosts may have one name
    except OSError:
        boot = ""
    mine = np.array([zlib.crc32(f"{boot}{platform.node()}".encode()), host_memory() >> 20], np.uint32)
    hosts, memory = np.transpose(multihost_utils.process_allgather(mine)).tolist()
    counts = [hosts.count(host) for host in hosts]
    least = min(range(len(hosts)), key=lambda i: memory[i] / counts[i])
    return counts[least], memory[least] << 20


# --------------------------------------------------------------------------------------------- cache


def _in_memory(dataset: Dataset) -> Callable[..., dict[str, np.ndarray]]:
    """What reads from a copy of the whole set in host memory."""
    if isinstance(dataset, Mixture):
        return functools.partial(dataset.read, readers=[_InMemory(part).read for part in dataset.parts])
    return _InMemory(dataset).read


class _InMemory:
    """The whole set in host memory; of captions all, as the step says which one is drawn."""

    def __init__(self, dataset: Dataset):
        chunk = 512
        self.moments = np.empty((len(dataset), *dataset.record_shape), dataset.metadata.dtype)
        reader = dataset.conditions
        self.table = CaptionTable(reader) if reader.of_text else None
        self.labels = {} if self.table else reader.empty(len(dataset))
        add = self.table.add if self.table else functools.partial(reader.put, self.labels, word=0)
        quiet = jax.process_index() != 0
        with tqdm.tqdm(total=len(dataset), desc="reading the dataset", unit="record", disable=quiet) as bar:
            for start in range(0, len(dataset), chunk):
                stop = min(start + chunk, len(dataset))
                dataset.read_into(self.moments, start, stop, add)
                bar.update(stop - start)

    def read(self, indices: np.ndarray, words: np.ndarray | None = None) -> dict[str, np.ndarray]:
        if self.table is None:
            condition = {name: value[indices] for name, value in self.labels.items()}
        else:
            assert words is not None
            condition = self.table.take(self.table.rows(indices, words))
        return {"moments": self.moments[indices], **condition}


def _check_room(dataset: Dataset, sharding: NamedSharding) -> None:
    """Raises ConfigError where a device has less room than the whole set needs."""
    for device in sharding.addressable_devices:
        stats = device.memory_stats() or {}  # type: ignore[attr-defined]
        room = stats.get("bytes_limit", sys.maxsize) - stats.get("bytes_in_use", 0)
        size = set_bytes(dataset)
        if size > room:
            raise ConfigError(
                f"--data.cache is device, which needs {size / 1e9:.1f} GB for {dataset!r}, but a device has "
                f"{room / 1e9:.1f} GB left; expected none, ram or a smaller set"
            )


def _device_batches(dataset: Dataset, order: AnyOrder, sharding: NamedSharding) -> Generator[Batch]:
    """Batches of a copy of the whole set on every device of the mesh."""
    _check_room(dataset, sharding)
    everywhere = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())

    def place(arrays: dict[str, np.ndarray], where: NamedSharding) -> Batch:
        return {
            name: jax.make_array_from_callback(value.shape, where, value.__getitem__)
            for name, value in arrays.items()
        }

    held = _InMemory(dataset)
    table, length = held.table, getattr(dataset.condition, "length", 0)
    moments = place({"moments": held.moments}, everywhere)
    told = place(table.arrays if table else held.labels, everywhere)
    if table:
        table.arrays = {}  # the host keeps which captions are whose

    @functools.partial(jax.jit, out_shardings=sharding)
    def gather(moments: Batch, told: Batch, rows: Batch) -> Batch:
        found = {"moments": moments["moments"][rows["record"]]}
        if table:
            return found | gather_captions(told, rows["caption"], length)
        return found | {name: value[rows["record"]] for name, value in told.items()}

    def stream() -> Generator[Batch]:
        for count in itertools.count():
            rows = {"record": order[count].astype(np.int32)}
            if table:
                rows["caption"] = table.rows(order[count], order.words(count)).astype(np.int32)
            yield gather(moments, told, place(rows, sharding))

    return stream()
