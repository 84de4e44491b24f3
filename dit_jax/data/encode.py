"""From a source of images to a finished latent dataset: shard by shard, resumable, in any number of
processes.

A shard's bytes are a pure function of (recipe, shard index). It is written beside the others under another
name and renamed when whole, after its facts (counts, sums, checksum) are on disk; whichever process sees all
shards whole gathers the facts into metadata.json, which makes the dataset visible. So it needs no
coordinator, and whatever was killed, a rerun gives the same files.

Legend: B images encoded at once, M views (1, or 2: image and mirror), h, w latent height and width, c
channels.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from dit_jax.data.crop import CROP
from dit_jax.data.decode import Example, decoded
from dit_jax.data.encoders import Encoder, Moments
from dit_jax.data.metadata import (
    METADATA_FILE,
    DataError,
    LatentMetadata,
    MomentsType,
    load_metadata,
    recipe,
    serialize,
    shard_name,
    write_tfds_metadata,
)
from dit_jax.data.sources import Source
from dit_jax.files import check_folder, sync_folder, write_whole

UNFINISHED = ".unfinished"  # folder of the recipe, the finished shards' facts and files being written
RECIPE_FILE = "recipe.json"


def prepare(
    source: Source,
    encoder: Encoder,
    directory: str | os.PathLike[str],
    *,
    image_size: int,
    mirrors: bool = True,
    dtype: MomentsType = "float16",
    shard_size: int = 4096,
    batch_size: int = 32,
    skip_bad: bool = False,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> LatentMetadata | None:
    """Encode this process's part of a source into `directory`, and finish the dataset if no part is missing.

    image_size: side of the square crop, pixels. shard_size: records in a shard. batch_size: images that one
    device encodes at once. workers: processes that decode and resize (0: none, decode here). Process i of n
    encodes the shards i, i + n, ...; all must see the same folder.

    Returns the metadata of the finished dataset, or None while other processes' shards are missing. Raises
    DataError for an image that cannot be decoded (unless skip_bad), for moments that are not finite in
    `dtype`, and where the folder holds a dataset of another recipe.
    """
    for option, value, least in (
        ("--batch-size", batch_size, 1), ("--shard-size", shard_size, 1), ("--workers", workers, 0),
    ):  # fmt: skip
        if value < least:
            raise DataError(f"{option} is {value}; expected {least} or more")
    if not 0 <= process_index < process_count:
        raise DataError(f"--process-index is {process_index}; expected 0 to {process_count - 1}")
    plan = _plan(source, encoder, image_size, mirrors, dtype, shard_size, batch_size)
    out = pathlib.Path(directory)
    if (out / METADATA_FILE).is_file():
        found = load_metadata(out)
        _require_same(plan, recipe(found), out, "a finished dataset")
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # a killed run may have left it
        return found
    _start(out, plan)
    mine = [i for i in range(process_index, plan.num_shards, process_count) if not _is_whole(out, i, plan)]
    _encode_shards(out, plan, mine, source, encoder, skip_bad, workers)
    if all(_is_whole(out, i, plan) for i in range(plan.num_shards)):
        return _finish(out, plan)
    return load_metadata(out) if (out / METADATA_FILE).is_file() else None


def _plan(
    source: Source,
    encoder: Encoder,
    image_size: int,
    mirrors: bool,
    dtype: MomentsType,
    shard_size: int,
    batch_size: int,
) -> LatentMetadata:
    """The metadata of a dataset that is yet to be made."""
    if image_size <= 0 or image_size % encoder.factor:
        raise DataError(
            f"--image-size is {image_size}; expected a multiple of the VAE's factor {encoder.factor}"
        )
    if len(source) == 0:
        raise DataError(f"{source.name} has no images; expected at least one")
    side = image_size // encoder.factor
    return LatentMetadata(
        source=source.name,
        source_hash=source.fingerprint(),
        source_count=len(source),
        vae=encoder.vae,
        vae_hash=encoder.vae_hash,
        vae_backend=encoder.backend,
        precision=encoder.precision,
        scaling_factor=encoder.scaling_factor,
        shift_factor=encoder.shift_factor,
        latent_shape=(side, side, encoder.channels),
        image_size=image_size,
        crop=CROP,
        mirrors=mirrors,
        dtype=dtype,
        num_classes=source.num_classes,
        label_names=source.label_names,
        shard_size=shard_size,
        batch_size=batch_size,
    )


# -------------------------------------------------------------------------------------- start, finish


def _start(out: pathlib.Path, plan: LatentMetadata) -> None:
    """Make the folder, or check that the unfinished dataset in it has the same recipe."""
    file = out / UNFINISHED / RECIPE_FILE
    if not file.is_file():
        if out.is_dir() and any(path.name != UNFINISHED for path in out.iterdir()):
            raise DataError(
                f"{out} is not empty and holds no dataset of ours; expected a new or an empty folder"
            )
        check_folder("the dataset's folder", file.parent)
        write_whole(file, json.dumps(recipe(plan), indent=2) + "\n")
    _require_same(plan, json.loads(file.read_text()), out, "an unfinished dataset")


def _require_same(plan: LatentMetadata, found: dict[str, Any], out: pathlib.Path, what: str) -> None:
    wanted = json.loads(json.dumps(recipe(plan)))
    found = json.loads(json.dumps(found))
    for key, value in wanted.items():
        if found.get(key) != value:
            raise DataError(
                f"{out} holds {what} with {key} {found.get(key)!r}, but this run has {value!r}; "
                "use the same options or another folder"
            )


def _is_whole(out: pathlib.Path, index: int, plan: LatentMetadata) -> bool:
    return (out / shard_name(index, plan.num_shards)).is_file() and _facts_file(out, index).is_file()


def _facts_file(out: pathlib.Path, index: int) -> pathlib.Path:
    return out / UNFINISHED / f"shard-{index:05d}.json"


def _finish(out: pathlib.Path, plan: LatentMetadata) -> LatentMetadata:
    """Gather the shards' facts into the metadata; metadata.json comes last and makes the dataset visible."""
    try:
        facts = [json.loads(_facts_file(out, i).read_text()) for i in range(plan.num_shards)]
        metadata = _gather(plan, facts)
        staging = out / UNFINISHED / f"finish-{secrets.token_hex(4)}"
        staging.mkdir()
        write_tfds_metadata(staging, metadata)
        for file in sorted(staging.iterdir()):
            os.replace(file, out / file.name)
        write_whole(staging / METADATA_FILE, metadata.to_json())
        os.replace(staging / METADATA_FILE, out / METADATA_FILE)
        sync_folder(out)
    except FileNotFoundError:
        if not (out / METADATA_FILE).is_file():
            raise
        metadata = load_metadata(out)  # another process has just finished the same dataset
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return metadata


def _gather(plan: LatentMetadata, facts: Sequence[dict[str, Any]]) -> LatentMetadata:
    count = sum(f["count"] for f in facts)
    if count == 0:
        raise DataError(f"no image of {plan.source} could be decoded")
    values = count * int(np.prod(plan.moments_shape[:3]))  # of one channel
    mean, _ = np.split(np.sum([f["sum"] for f in facts], axis=0) / values, 2)
    mean_square, variance = np.split(np.sum([f["sum_of_squares"] for f in facts], axis=0) / values, 2)
    std = np.sqrt(np.maximum(mean_square - mean**2, 0) + variance)
    return dataclasses.replace(
        plan,
        count=count,
        latent_mean=tuple(mean.tolist()),
        latent_std=tuple(std.tolist()),
        skipped=tuple((name, reason) for f in facts for name, reason in f["skipped"]),
        shard_counts=tuple(f["count"] for f in facts),
        shard_bytes=tuple(f["bytes"] for f in facts),
        shard_sha256=tuple(f["sha256"] for f in facts),
    )


# --------------------------------------------------------------------------------------------- encode


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Examples of one shard to encode together; a shard's last batch is padded and may hold no example."""

    shard: int
    examples: list[Example]
    last: bool


def _encode_shards(
    out: pathlib.Path,
    plan: LatentMetadata,
    shards: Sequence[int],
    source: Source,
    encoder: Encoder,
    skip_bad: bool,
    workers: int,
) -> None:
    """Decode, encode and write the given shards; the device works on one batch while the next is decoded."""
    size = plan.batch_size * encoder.devices
    encode = encoder.compile(plan.mirrors, plan.dtype)
    ranges = [range(i * plan.shard_size, min((i + 1) * plan.shard_size, len(source))) for i in shards]
    total = sum(map(len, ranges))
    writer: _ShardWriter | None = None
    waiting: collections.deque[tuple[_Batch, Any]] = collections.deque()
    indices = [index for part in ranges for index in part]
    with (
        tqdm.tqdm(total=total, desc="encoding", unit="images", smoothing=0.05) as bar,
        decoded(source, indices, plan.image_size, 0 if source.in_memory else workers) as examples,
    ):

        def write(batch: _Batch, moments: Any) -> None:
            nonlocal writer
            writer = writer or _ShardWriter(out, plan, batch.shard)
            writer.write(batch.examples, np.asarray(moments))
            bar.update(len(batch.examples))
            if batch.last:
                writer.close()
                writer = None

        try:
            for batch in _batches(zip(shards, ranges, strict=True), examples, size, skip_bad):
                waiting.append((batch, _start_encoding(encode, batch, size, plan.image_size)))
                if len(waiting) > 1:
                    write(*waiting.popleft())
            while waiting:
                write(*waiting.popleft())
        finally:
            if writer is not None:
                writer.abandon()


def _batches(
    shards: Iterable[tuple[int, range]], examples: Iterator[Example], size: int, skip_bad: bool
) -> Iterator[_Batch]:
    for shard, indices in shards:
        group: list[Example] = []
        good = 0
        for position in range(len(indices)):
            example = next(examples)
            if example.problem and not skip_bad:
                raise DataError(
                    f"{example.id} cannot be decoded: {example.problem}; "
                    "repair or remove it, or pass --skip-bad"
                )
            group.append(example)
            good += not example.problem
            last = position == len(indices) - 1
            if good == size or last:
                yield _Batch(shard, group, last)
                group, good = [], 0


def _start_encoding(encode: Moments, batch: _Batch, size: int, side: int) -> Any:
    images = np.zeros((size, side, side, 3), np.uint8)  # always of one shape: one program, equal bits
    good = [example.image for example in batch.examples if example.image is not None]
    if good:
        images[: len(good)] = good
    return encode(images)


class _ShardWriter:
    """One shard being written; `close` makes it visible."""

    def __init__(self, out: pathlib.Path, plan: LatentMetadata, index: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._out, self._plan, self._index = out, plan, index
        self._file = out / UNFINISHED / f"shard-{index:05d}-{secrets.token_hex(4)}"
        # One record per chunk for random access; moments are noise to a compressor.
        self._writer = ArrayRecordWriter(os.fspath(self._file), "group_size:1,uncompressed")
        self._count = 0
        self._skipped: list[tuple[str, str]] = []
        self._sums = np.zeros(
            (2, 2 * plan.latent_shape[2])
        )  # of the moments and of their squares, per channel

    def write(self, examples: Sequence[Example], moments: np.ndarray) -> None:
        """Add a batch: examples with an image take the rows of moments (B, M, h, w, 2c) in order."""
        good = [example for example in examples if not example.problem]
        self._skipped += [(example.id, example.problem) for example in examples if example.problem]
        moments = moments[: len(good)]
        finite = np.isfinite(moments).all(axis=(1, 2, 3, 4))
        if not finite.all():
            raise DataError(
                f"the moments of {good[int(np.argmin(finite))].id} are not finite in {self._plan.dtype}; "
                "expected finite numbers: try --dtype float32 and --precision float32"
            )
        for example, row in zip(good, moments, strict=True):
            if not 0 <= example.label < max(1, self._plan.num_classes):
                raise DataError(
                    f"{example.id} has label {example.label}; expected 0 to {self._plan.num_classes - 1}"
                )
            self._writer.write(serialize(example.id, example.label, row))
        self._count += len(good)
        values = moments.reshape(len(good), -1, moments.shape[-1]).astype(np.float32)  # (B, M h w, 2c)
        totals = (np.sum(x, axis=1, dtype=np.float64) for x in (values, np.square(values)))  # each (B, 2c)
        # Image after image, so that the sums' last bits do not depend on how many come in one call.
        for total, square in zip(*totals, strict=True):
            self._sums[0] += total
            self._sums[1] += square

    def close(self) -> None:
        """Put the shard's facts on disk, then give the file its name."""
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
        write_whole(_facts_file(self._out, self._index), json.dumps(facts) + "\n")
        os.replace(self._file, self._out / shard_name(self._index, self._plan.num_shards))
        sync_folder(self._out)

    def abandon(self) -> None:
        """Drop the shard after an error."""
        self._writer.close()
        self._file.unlink(missing_ok=True)
