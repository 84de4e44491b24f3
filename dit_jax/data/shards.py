"""One shard of a latent dataset being written, and its facts: counts, sums, checksum.

Legend: B images in a batch, M views (1, or 2: image and mirror), h, w latent height and width, c channels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import secrets
import tempfile
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from dit_jax import paths, signals
from dit_jax.data.decode import Example
from dit_jax.data.metadata import DataError, LatentMetadata, shard_name
from dit_jax.data.records import Captions, serialize
from dit_jax.files import sync_folder, write_whole

UNFINISHED = ".unfinished"  # folder of the recipe, the finished shards' facts and files being written


def facts_file(out: pathlib.Path, index: int) -> pathlib.Path:
    """Where a finished shard's facts lie until the dataset is finished."""
    return out / UNFINISHED / f"shard-{index:05d}.json"


def whole_shards(out: pathlib.Path, plan: LatentMetadata) -> set[int]:
    """The shards that are finished."""
    shards, facts = set(paths.names_in(out)), set(paths.names_in(out / UNFINISHED))
    return {
        index
        for index in range(plan.num_shards)
        if shard_name(index, plan.num_shards) in shards and facts_file(out, index).name in facts
    }


def drop_partial(out: pathlib.Path, shards: Collection[int]) -> None:
    """Remove what killed processes have written of these shards; no living one may be writing them.

    In a bucket there is nothing to remove: a shard is written on the disk, and put there when it is whole.
    """
    if paths.is_remote(out):
        return
    for file in (out / UNFINISHED).iterdir():
        partial = re.fullmatch(r"shard-(\d+)-[0-9a-f]+", file.name)
        if partial and int(partial[1]) in shards:
            file.unlink(missing_ok=True)


class ShardWriter:
    """One shard being written; `close` makes it visible. Raises OSError where the disk takes no more."""

    def __init__(self, out: pathlib.Path, plan: LatentMetadata, index: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._out, self._plan, self._index = out, plan, index
        name = f"shard-{index:05d}-{secrets.token_hex(4)}"
        self._file = pathlib.Path(tempfile.gettempdir()) / f"dit_jax-{name}"
        if not paths.is_remote(out):
            self._file = out / UNFINISHED / name
        else:
            signals.unfinished.add(os.fspath(self._file))
        # One record per chunk for random access; moments are noise to a compressor.
        with _as_os_error():
            self._writer = ArrayRecordWriter(os.fspath(self._file), "group_size:1,uncompressed")
        self._count, self._captions, self._tokens = 0, 0, 0
        self._skipped: list[tuple[str, str]] = []
        self._sums = np.zeros(
            (2, 2 * plan.latent_shape[2])
        )  # of the moments and of their squares, per channel

    def write(
        self, examples: Sequence[Example], moments: np.ndarray, captions: Sequence[Captions] | None = None
    ) -> None:
        """Add a batch: examples with an image take the rows of moments (B, M, h, w, 2c) in order.

        captions: of the examples with an image, embedded (None: their words).
        """
        good = [example for example in examples if not example.problem]
        self._skipped += [(example.id, example.problem) for example in examples if example.problem]
        moments = moments[: len(good)]
        finite = np.isfinite(moments).all(axis=(1, 2, 3, 4))
        if not finite.all():
            raise DataError(
                f"the moments of {good[int(np.argmin(finite))].id} are not finite in {self._plan.dtype}; "
                "expected finite numbers: try --dtype float32 and --precision float32"
            )
        captions = captions or [Captions(example.captions) for example in good]
        for example, row, said in zip(good, moments, captions, strict=True):
            if not 0 <= example.label < max(1, self._plan.num_classes):
                raise DataError(
                    f"{example.id} has label {example.label}; expected 0 to {self._plan.num_classes - 1}"
                )
            with _as_os_error():
                self._writer.write(serialize(example.id, {"label": example.label}, row, said))
        self._count += len(good)
        self._captions += sum(len(said.words) for said in captions)
        self._tokens += sum(said.tokens for said in captions)
        values = moments.reshape(len(good), -1, moments.shape[-1]).astype(np.float32)  # (B, M h w, 2c)
        totals = (np.sum(x, axis=1, dtype=np.float64) for x in (values, np.square(values)))  # each (B, 2c)
        # Image after image, so that the sums' last bits do not depend on how many come in one call.
        for total, square in zip(*totals, strict=True):
            self._sums[0] += total
            self._sums[1] += square

    def close(self) -> None:
        """Put the shard's facts on disk, then give the file its name."""
        with _as_os_error():
            self._writer.close()
        with open(self._file, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        facts = {
            "count": self._count,
            "bytes": self._file.stat().st_size,
            "sha256": checksum,
            "skipped": self._skipped,
            "sum": self._sums[0].tolist(),
            "sum_of_squares": self._sums[1].tolist(),
        }
        if self._plan.text:
            facts |= {"captions": self._captions, "caption_tokens": self._tokens}
        write_whole(facts_file(self._out, self._index), json.dumps(facts) + "\n")
        paths.publish(self._file, self._out / shard_name(self._index, self._plan.num_shards))
        signals.unfinished.discard(os.fspath(self._file))
        sync_folder(self._out)

    def abandon(self) -> None:
        """Drop the shard after an error."""
        with contextlib.suppress(OSError), _as_os_error():  # it may be the writer that failed
            self._writer.close()
        self._file.unlink(missing_ok=True)
        signals.unfinished.discard(os.fspath(self._file))


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """ArrayRecord's errors of a file that cannot be written, as what they are."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).split(";")[0]) from None  # the rest names a temporary file and a byte
