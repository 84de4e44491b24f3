"""Which records a step reads: a pure function of (seed, step), of one dataset or of several with weights.

Legend: B global batch, n records of a set, K parts of a mixture.
"""

from __future__ import annotations

import collections
import functools
import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from dit_jax.data.captions import caption_words

OrderKind = Literal["sorted", "keyed"]
"""How an epoch is ordered: by sorting a random word of each record, or by a permutation with a key."""
KEYED_FROM = 2**24  # records, whose sorted order is 128 MB
# Of the permutation's cipher. With the library's usual 4, neighbours of a billion correlate by 0.55, with 6 by 0.1.
ROUNDS = 12


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
            of_set = [
                kept for kept in self._kept if kept[::2] == key[::2]
            ]  # each part of a mixture is another
            if len(of_set) > self.KEPT:
                del self._kept[of_set[0]]
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


def records_at(seed: int, positions: np.ndarray, n: int, kind: OrderKind = "sorted") -> np.ndarray:
    """Records at these positions (B,) of the endless stream of epochs of one set."""
    epoch = positions // n
    indices = np.empty(len(positions), np.int64)
    for e in np.unique(epoch):
        here = epoch == e
        if kind == "keyed":
            indices[here] = keyed_order(seed, int(e), n, positions[here] % n)
        else:
            indices[here] = epoch_order(seed, int(e), n)[positions[here] % n]
    return indices


def batch_indices(seed: int, step: int, batch_size: int, n: int, kind: OrderKind = "sorted") -> np.ndarray:
    """Records (B,) of the global batch of a step (from 0). Batches straddle epochs, so none is ever left
    out."""
    return records_at(seed, step * batch_size + np.arange(batch_size), n, kind)


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


# ------------------------------------------------------------------------------------------- mixtures

BLOCK = 64  # draws that are shuffled among each other: before and after them every part has its share
_MIX = 0x313C  # apart from the epochs, which have a seed's own key, and from the captions' words
_PART = 2**32  # above every seed of a run: each part has keys of its own


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights as the smallest whole numbers of the same ratio, each taken as it is written: 0.1 is a tenth."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    return tuple(weight // math.gcd(*whole) for weight in whole)


def counts_before(weights: tuple[int, ...], draws: np.ndarray) -> np.ndarray:
    """How many of the first `draws` (P,) of the even sequence each part has, (K, P) integers, Python's if need be.

    The first part has its weight's share of the draws, rounded down, the second its share of the others, and so on:
    exact at any draw, without those before it, and never more than K - 1 from the share that the weights say.
    """
    total, counts = sum(weights), []
    rest = draws.astype(np.int64 if max(1, int(draws.max())) * total < 2**63 else object)
    for weight in weights[:-1]:
        counts.append(rest * weight // total)
        rest, total = rest - counts[-1], total - weight
    return np.stack([*counts, rest])


@functools.lru_cache(maxsize=256)
def _block(weights: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(part, how many draws of that part came before) of each draw of a block, (BLOCK,) each."""
    counts = counts_before(weights, block * BLOCK + np.arange(BLOCK + 1)).astype(np.int64)
    parts = np.argmax(np.diff(counts), axis=0)
    key = np.array([seed, _PART * _MIX + block], np.uint64)
    parts = parts[np.argsort(np.random.Philox(key=key).random_raw(BLOCK), kind="stable")]
    before = np.empty(BLOCK, np.int64)
    for part, count in enumerate(counts[:, 0]):
        here = parts == part
        before[here] = count + np.arange(np.count_nonzero(here))
    return parts, before


def drawn_parts(weights: tuple[int, ...], seed: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(part, how many draws of that part came before) of each of these draws (P,), a pure function of its arguments.

    The even sequence of `counts_before`, each block of it shuffled by a key: batches and windows of the log have
    the parts in their shares, with no period that a run's intervals could fall in with.
    """
    parts, before = np.empty(len(draws), np.int64), np.empty(len(draws), np.int64)
    for block in np.unique(draws // BLOCK).tolist():
        here = draws // BLOCK == block
        of_block = _block(weights, seed, block)
        parts[here], before[here] = (values[draws[here] % BLOCK] for values in of_block)
    return parts, before


@dataclass(frozen=True)
class MixedOrder:
    """As `Order`, of several sets of `sizes` (K,) records, which are numbered one set after the other.

    run: records in a row that one draw gives; the batch size where a batch must be of one part.
    """

    seed: int
    batch_size: int
    sizes: tuple[int, ...]
    weights: tuple[int, ...]
    start: int = 0
    kinds: tuple[OrderKind, ...] = ()
    run: int = 1

    def __getitem__(self, count: int) -> np.ndarray:
        positions = (self.start + count) * self.batch_size + np.arange(self.batch_size)
        parts, before = drawn_parts(self.weights, self.seed, positions // self.run)
        within = before * self.run + positions % self.run
        records = np.empty(self.batch_size, np.int64)
        for part in np.unique(parts).tolist():
            here = parts == part
            found = records_at(self.seed + _PART * part, within[here], self.sizes[part], self.kinds[part])
            records[here] = sum(self.sizes[:part]) + found
        return records

    def words(self, count: int) -> np.ndarray:
        """The words (B,) that draw the captions of that batch."""
        return caption_words(self.seed, self.start + count, self.batch_size)
