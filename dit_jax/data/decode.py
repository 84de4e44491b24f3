"""Decoding and resizing in worker processes, ahead of the encoder, in order."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from dit_jax.data.crop import center_crop
from dit_jax.data.sources import BadImageError, Source

CHUNK = 8  # images in a task: few enough to start quickly, enough to hide a task's cost
CHUNKS_AHEAD = 8  # per worker


@dataclass(frozen=True)
class Example:
    """A record of a source: a picture, or why there is none."""

    id: str
    label: int
    image: np.ndarray | None
    """(S, S, 3) uint8."""
    problem: str = ""
    captions: tuple[str, ...] = ()


def decode(source: Source, index: int, size: int) -> Example:
    """Record `index` of a source as a centre crop of side `size`."""
    try:
        image, label = source.read(index)
        captions = whole_captions(source.captions(index)) if source.has_captions else ()
        return Example(source.id(index), label, center_crop(image, size), captions=captions)
    except BadImageError as error:
        return Example(source.id(index), 0, None, str(error) or type(error).__name__)


def whole_captions(found: Sequence[str]) -> tuple[str, ...]:
    """A record's captions without white space around them. Raises BadImageError for none and for an empty one."""
    captions = tuple(caption.strip() for caption in found)
    if not captions:
        raise BadImageError("it has no caption; expected at least one")
    if not all(captions):
        raise BadImageError("its caption is empty; expected words")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError:  # halves of a character, as JSON can spell them
        raise BadImageError("its caption is no text that is UTF-8") from None
    return captions


@contextlib.contextmanager
def decoded(source: Source, indices: Sequence[int], size: int, workers: int) -> Iterator[Iterator[Example]]:
    """The records of these indices in order, decoded ahead by `workers` processes (0: here, when asked for)."""
    if workers == 0:
        yield (decode(source, index, size) for index in indices)
        return
    # spawn: a forked child of a process that runs JAX's threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(source, size))
    try:
        yield _in_order(pool, indices, CHUNKS_AHEAD * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, indices: Sequence[int], ahead: int) -> Iterator[Example]:
    tasks: collections.deque[Future[list[Example]]] = collections.deque()
    for start in range(0, len(indices), CHUNK):
        tasks.append(pool.submit(_decode_chunk, indices[start : start + CHUNK]))
        if len(tasks) > ahead:
            yield from tasks.popleft().result()
    while tasks:
        yield from tasks.popleft().result()


_worker: tuple[Source, int]


def _start_worker(source: Source, size: int) -> None:
    global _worker
    _worker = (source, size)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent ends them
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent takes its workers along: an orphan would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _decode_chunk(indices: Sequence[int]) -> list[Example]:
    source, size = _worker
    return [decode(source, index, size) for index in indices]
