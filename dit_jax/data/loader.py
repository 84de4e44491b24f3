"""From a dataset to sharded batches on the devices, in an order that is a pure function of (seed, step).

Legend: B global batch, n records, M views, h, w latent height and width, c latent channels.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import pathlib
import platform
import sys
import threading
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import jax
import numpy as np
import tqdm
from jax.sharding import NamedSharding

from dit_jax.config import ConfigError
from dit_jax.data.captions import CaptionTable, caption_words
from dit_jax.data.captions import gather as gather_captions
from dit_jax.data.latents import LatentDataset
from dit_jax.memory import host_memory

Cache = Literal["none", "ram", "device"]
Batch = dict[str, jax.Array]

OrderKind = Literal["sorted", "keyed"]
"""How an epoch is ordered: by sorting a random word of each record, or by a permutation with a key."""
KEYED_FROM = 2**24  # records, whose sorted order is 128 MB
# Of the permutation's cipher. With the library's usual 4, neighbours of a billion correlate by 0.55, with 6 by 0.1.
ROUNDS = 12

BATCHES_PLACED = 2  # on the devices, ahead of the step


# --------------------------------------------------------------------------------------------- order


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation (n,) of the records, without replacement: a pure function of its arguments, kept for a while.

    Sorting the counter-based generator's raw words keeps the order fixed: NumPy promises the stream of a bit
    generator, but not that of `Generator.permutation`.
    """
    return _orders(seed, epoch, n)


def _shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # every caller gets the same array
    return order


class _Orders:
    """Computes each epoch's order once, however many threads ask for it, and the next epoch's ahead of its time."""

    KEPT = 4  # a batch may straddle two epochs, while other threads are still in the one before
    AHEAD = 2**16  # records from which on a step would notice the wait for an order

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[tuple[int, int, int], Future[np.ndarray]] = (
            collections.OrderedDict()
        )

    def __call__(self, seed: int, epoch: int, n: int) -> np.ndarray:
        future, is_new = self._find(seed, epoch, n)
        if is_new:
            _fulfil(future, seed, epoch, n)
        order = future.result()
        if n >= self.AHEAD:
            future, is_new = self._find(seed, epoch + 1, n)
            if is_new:
                threading.Thread(target=_fulfil, args=(future, seed, epoch + 1, n), daemon=True).start()
        return order

    def _find(self, *key: int) -> tuple[Future[np.ndarray], bool]:
        """The promise of an order, and whether it is the caller who has to keep it."""
        with self._lock:
            is_new = key not in self._kept
            future = self._kept.setdefault(key, Future())  # type: ignore[arg-type]
            self._kept.move_to_end(key)  # type: ignore[arg-type]
            if len(self._kept) > self.KEPT:
                self._kept.popitem(last=False)
        return future, is_new


def _fulfil(future: Future[np.ndarray], seed: int, epoch: int, n: int) -> None:
    try:
        future.set_result(_shuffled(seed, epoch, n))
    except BaseException as error:  # out of memory: whoever waits hears of it
        future.set_exception(error)


_orders = _Orders()


def order_kind(n: int) -> OrderKind:
    """How a new run on n records orders them: from KEYED_FROM on without an array of them all."""
    return "keyed" if n >= KEYED_FROM else "sorted"


def keyed_order(seed: int, epoch: int, n: int, positions: np.ndarray) -> np.ndarray:
    """The records at these positions of an epoch: of a permutation that is a function of a key, in no memory."""
    from grain.experimental import index_shuffle

    key = int(np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(1)[0]) % 2**32
    return np.asarray([index_shuffle(at, n - 1, key, ROUNDS) for at in positions.tolist()], np.int64)


def batch_indices(seed: int, step: int, batch_size: int, n: int, kind: OrderKind = "sorted") -> np.ndarray:
    """Records (B,) of the global batch of a step (from 0). Batches straddle epochs, so none is ever left
    out."""
    position = step * batch_size + np.arange(batch_size)
    epoch = position // n
    indices = np.empty(batch_size, np.int64)
    for e in np.unique(epoch):
        here = epoch == e
        if kind == "keyed":
            indices[here] = keyed_order(seed, int(e), n, position[here] % n)
        else:
            indices[here] = epoch_order(seed, int(e), n)[position[here] % n]
    return indices


@dataclass(frozen=True)
class Order:
    """The records (B,) of the batches from `start` on: order[i] is the batch of step start + i."""

    seed: int
    batch_size: int
    n: int
    start: int = 0
    kind: OrderKind = "sorted"

    def __getitem__(self, count: int) -> np.ndarray:
        return batch_indices(self.seed, self.start + count, self.batch_size, self.n, self.kind)

    def words(self, count: int) -> np.ndarray:
        """The words (B,) that draw the captions of that batch."""
        return caption_words(self.seed, self.start + count, self.batch_size)


# ------------------------------------------------------------------------------------------- batches


def batches(
    dataset: LatentDataset,
    batch_size: int,
    seed: int,
    start_step: int,
    sharding: NamedSharding,
    cache: Cache = "none",
    workers: int = 0,
    kind: OrderKind = "sorted",
) -> Generator[Batch]:
    """Endless batches from `start_step` on: `moments` (B, M, h, w, 2c) and the condition, global arrays.

    sharding splits the batch axis; each process reads only the rows of its own devices. cache holds the whole
    set in host memory ("ram") or on every device ("device"). workers: threads that read ahead, 0 chosen by
    the machine. kind: the order of an epoch, with which a run goes on as it began. Close the generator
    (`contextlib.closing`) to stop its threads.

    Raises ConfigError where the batch does not split over the devices, the set is empty, or set or batches do not
    fit into memory.
    """
    if len(dataset) == 0:
        raise ConfigError(f"{dataset!r} is empty; expected at least one record")
    try:
        sharding.shard_shape((batch_size,))
    except ValueError as error:
        raise ConfigError(
            f"--train.batch-size is {batch_size}, which does not split evenly: {error}"
        ) from None
    check_memory(dataset, batch_size, cache, workers)
    order = Order(seed, batch_size, len(dataset), start_step, kind)
    if cache == "device":
        return _device_batches(dataset, order, sharding)
    read = _InMemory(dataset).read if cache == "ram" else dataset.read
    rows = local_rows(sharding, batch_size)
    steps = _Steps(read, order, rows, dataset.conditions.of_text)
    return _streamed_batches(steps, sharding, workers)


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
    order: Order
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


def check_memory(dataset: LatentDataset, batch_size: int, cache: Cache = "none", workers: int = 0) -> None:
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


def set_bytes(dataset: LatentDataset) -> int:
    """Bytes of a whole set as a cache holds it."""
    return len(dataset) * dataset.record_bytes + dataset.conditions.cached_bytes


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


class _InMemory:
    """The whole set in host memory; of captions all, as the step says which one is drawn."""

    def __init__(self, dataset: LatentDataset):
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


def _check_room(dataset: LatentDataset, sharding: NamedSharding) -> None:
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


def _device_batches(dataset: LatentDataset, order: Order, sharding: NamedSharding) -> Generator[Batch]:
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
