"""From a source of images to a finished latent dataset: shard by shard, resumable, in any number of
processes.

A shard's bytes are a pure function of (recipe, shard index). It is written beside the others under another
name and renamed when whole, after its facts (counts, sums, checksum) are on disk; whichever process sees all
shards whole gathers the facts into metadata.json, which makes the dataset visible. Processes that would make the
same shards take turns. So it needs no coordinator, and whatever was killed, a rerun gives the same files.

Legend: B images encoded at once, M views (1, or 2: image and mirror), h, w latent height and width, c
channels.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from dit_jax import paths
from dit_jax.data.claims import FIRST_SHARD, RECIPE, claimed
from dit_jax.data.crop import CROP
from dit_jax.data.decode import Example, decoded
from dit_jax.data.embed import Embedder
from dit_jax.data.encoders import Encoder, Moments
from dit_jax.data.metadata import (
    METADATA_FILE,
    DataError,
    LatentMetadata,
    MomentsType,
    load_metadata,
    recipe,
)
from dit_jax.data.records import Captions, write_tfds_metadata
from dit_jax.data.shards import UNFINISHED, ShardWriter, drop_partial, facts_file, whole_shards
from dit_jax.data.sources import Source
from dit_jax.files import check_folder, write_whole
from dit_jax.memory import host_memory

RECIPE_FILE = "recipe.json"
CLAIMS_FILE = "claims"
MOST_WORKERS = 1024  # processes: more is a slip of the keyboard that no machine survives


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
    embedder: Embedder | None = None,
    option: str = "--out",
) -> LatentMetadata | None:
    """Encode this process's part of a source into `directory`, and finish the dataset if no part is missing.

    image_size: side of the square crop, pixels. shard_size: records in a shard. batch_size: images that one
    device encodes at once. workers: processes that decode and resize (0: none, decode here). Process i of n
    encodes the shards i, i + n, ...; all must see the same folder. embedder: what is stored of captions (None: their
    words, where the source has any). option: what named the folder.

    Returns the metadata of the finished dataset, or None while other processes' shards are missing. Raises
    DataError for an image that cannot be decoded (unless skip_bad), for moments that are not finite in
    `dtype`, where the folder holds a dataset of another recipe and where it cannot be written.
    """
    for name, value, least in (
        ("--batch-size", batch_size, 1), ("--shard-size", shard_size, 1), ("--workers", workers, 0),
    ):  # fmt: skip
        if value < least:
            raise DataError(f"{name} is {value}; expected {least} or more")
    if workers > MOST_WORKERS:
        raise DataError(f"--workers is {workers}; expected at most {MOST_WORKERS} processes")
    held, room = batch_size * encoder.devices * max(image_size, 0) ** 2 * 3, host_memory()
    if held > room:
        raise DataError(
            f"--batch-size is {batch_size} and --image-size {image_size}: batches of {held // 10**6} MB, but "
            f"there are {room // 10**6} MB of memory; expected less"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"--process-index is {process_index}; expected 0 to {process_count - 1}")
    embedder = (embedder or Embedder()) if source.has_captions else None
    plan = _plan(source, encoder, image_size, mirrors, dtype, shard_size, batch_size, embedder)
    out, mine = paths.to_path(directory), range(process_index, plan.num_shards, process_count)
    try:
        metadata = _look(out, plan) or _make(
            out, plan, mine, source, encoder, skip_bad, workers, embedder, option
        )
    except OSError as error:
        metadata = _look(out, plan)  # another process may have finished the same dataset and cleared up
        if metadata is None:
            raise DataError(
                f"{option}, the dataset's folder, is {str(out)!r}, where a file cannot be written ({error}); "
                "expected a folder with room: the same command then goes on"
            ) from None
    if metadata:
        paths.remove(out / UNFINISHED)  # of this run or of one that was killed
    return metadata


def _plan(
    source: Source,
    encoder: Encoder,
    image_size: int,
    mirrors: bool,
    dtype: MomentsType,
    shard_size: int,
    batch_size: int,
    embedder: Embedder | None,
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
        text=embedder.stored if embedder else None,
    )


# -------------------------------------------------------------------------------------- start, finish


def _look(out: pathlib.Path, plan: LatentMetadata) -> LatentMetadata | None:
    """The finished dataset in the folder, None where it is yet to be made; DataError for one of another recipe."""
    if paths.is_file(out / METADATA_FILE):
        found = load_metadata(out)
        _require_same(plan, recipe(found), out, "a finished dataset")
        return found
    file = out / UNFINISHED / RECIPE_FILE
    if paths.is_file(file):
        _require_same(plan, _read_recipe(file), out, "an unfinished dataset")
    elif any(name != UNFINISHED for name in paths.names_in(out)):
        if (out / METADATA_FILE).is_file():  # finished in this moment, by another process
            return _look(out, plan)
        raise DataError(f"{out} is not empty and holds no dataset of ours; expected a new or an empty folder")
    return None


def _read_recipe(file: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(paths.read_bytes(file))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); expected it as prepare.py wrote it") from None
    if not isinstance(found, dict):
        raise DataError(f"{file} holds no recipe; expected it as prepare.py wrote it")
    return found


def _make(
    out: pathlib.Path,
    plan: LatentMetadata,
    mine: Sequence[int],
    source: Source,
    encoder: Encoder,
    skip_bad: bool,
    workers: int,
    embedder: Embedder | None,
    option: str,
) -> LatentMetadata | None:
    """Encode the shards `mine` where they are missing, and finish the dataset if none is missing then.

    Another process that makes the same shards is waited for: what it has done need not be done again.
    """
    check_folder(f"{option}, the dataset's folder,", out)
    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    claims = out / UNFINISHED / CLAIMS_FILE
    with claimed(claims, [RECIPE]):
        if _look(out, plan) is None and not (out / UNFINISHED / RECIPE_FILE).is_file():
            write_whole(out / UNFINISHED / RECIPE_FILE, json.dumps(recipe(plan), indent=2) + "\n")
    with claimed(claims, [FIRST_SHARD + i for i in mine]) as alone:
        if metadata := _look(out, plan):
            return metadata
        whole = whole_shards(out, plan)
        missing = [i for i in mine if i not in whole]
        if alone:
            drop_partial(out, missing)
        _encode_shards(out, plan, missing, source, encoder, skip_bad, workers, embedder)
        if len(whole_shards(out, plan)) == plan.num_shards:
            return _finish(out, plan)
    return _look(out, plan)


def _require_same(plan: LatentMetadata, found: dict[str, Any], out: pathlib.Path, what: str) -> None:
    wanted, found = (_flat(json.loads(json.dumps(facts))) for facts in (recipe(plan), found))
    for key in sorted(
        wanted | found, key=lambda key: not key.startswith("text")
    ):  # captions are of source_hash too
        if found.get(key) != wanted.get(key):
            raise DataError(
                f"{out} holds {what} with {key} {found.get(key)!r}, but this run has {wanted.get(key)!r}; "
                "use the same options or another folder"
            )


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts, those of captions under names of their own."""
    text = facts.get("text")
    of_text = {f"text {name}": value for name, value in text.items()} if isinstance(text, dict) else {}
    return {name: value for name, value in facts.items() if name != "text"} | of_text


def _finish(out: pathlib.Path, plan: LatentMetadata) -> LatentMetadata:
    """Gather the shards' facts into the metadata; metadata.json comes last and makes the dataset visible."""
    facts = [json.loads(paths.read_bytes(facts_file(out, i))) for i in range(plan.num_shards)]
    metadata = _gather(plan, facts)
    beside = None if paths.is_remote(out) else out / UNFINISHED  # of one disk with it
    with tempfile.TemporaryDirectory(dir=beside, prefix="finish-") as folder:
        staging = pathlib.Path(folder)
        write_tfds_metadata(staging, metadata)
        for file in sorted(staging.iterdir()):
            paths.publish(file, out / file.name)
    write_whole(out / METADATA_FILE, metadata.to_json())
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
        captions=sum(f.get("captions", 0) for f in facts),
        caption_tokens=sum(f.get("caption_tokens", 0) for f in facts),
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
    embedder: Embedder | None,
) -> None:
    """Decode, encode and write the given shards; the device works on one batch while the next is decoded."""
    size = plan.batch_size * encoder.devices
    encode = encoder.compile(plan.mirrors, plan.dtype)
    ranges = [range(i * plan.shard_size, min((i + 1) * plan.shard_size, len(source))) for i in shards]
    total = sum(map(len, ranges))
    writer: ShardWriter | None = None
    waiting: collections.deque[tuple[_Batch, Any]] = collections.deque()
    indices = [index for part in ranges for index in part]
    with (
        tqdm.tqdm(total=total, desc="encoding", unit="images", smoothing=0.05) as bar,
        decoded(source, indices, plan.image_size, 0 if source.in_memory else workers) as examples,
    ):

        def write(batch: _Batch, moments: Any) -> None:
            nonlocal writer
            writer = writer or ShardWriter(out, plan, batch.shard)
            # The device works on the next batch meanwhile.
            captions = _embedded(embedder, batch, plan.batch_size) if embedder else None
            writer.write(batch.examples, np.asarray(moments), captions)
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


def _embedded(embedder: Embedder, batch: _Batch, size: int) -> list[Captions]:
    """The captions of a batch's examples with an image, `size` examples at a time, however many devices there are: an
    encoder may round a caption otherwise beside others."""
    good = [example for example in batch.examples if not example.problem]
    parts = [embedder.captions(good[start : start + size]) for start in range(0, len(good), size)]
    return [said for part in parts for said in part]


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
