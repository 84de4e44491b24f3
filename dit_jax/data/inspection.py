"""Looking at a finished dataset: every record checked, a sheet of decoded samples.

Legend: M views (image, mirror), h, w latent height and width, c latent channels.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import jax
import numpy as np
import tqdm

from dit_jax.conditions import Condition
from dit_jax.data.captions import Reader, captions_in
from dit_jax.data.latents import LatentDataset
from dit_jax.data.metadata import METADATA_FILE, DataError, LatentMetadata, StoredText
from dit_jax.pictures import save_grid, to_uint8

CHUNK = 256
COLUMNS = 8


def check(dataset: LatentDataset) -> None:
    """Read everything once: checksums of the shards, then each record's shape, numbers and label.

    Raises DataError at the first thing that is not as the metadata says.
    """
    m = dataset.metadata
    if sum(m.shard_counts) != m.count:
        raise DataError(f"{METADATA_FILE} counts {m.count} records, but its shards {sum(m.shard_counts)}")
    for shard, expected in zip(dataset.shards, m.shard_sha256, strict=True):
        with shard.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise DataError(f"{shard} has another checksum than {METADATA_FILE} says: it is damaged")
    sums, told = np.zeros((3, m.latent_shape[2])), np.zeros(2, int)
    with tqdm.tqdm(total=m.count, desc="checking", unit="records", unit_scale=True) as bar:
        for start in range(0, m.count, CHUNK):
            rows = np.arange(start, min(start + CHUNK, m.count))
            batch = dataset.read(rows)
            _check_records(rows, batch["moments"], m.condition.of(batch), m)
            if m.text is not None:
                told += _check_captions(dataset, rows, Reader(m.text.condition, m), bool(m.text.encoder))
            mean, std = np.split(batch["moments"].astype(np.float64), 2, axis=-1)
            sums += [np.sum(value, axis=(0, 1, 2, 3)) for value in (mean, mean**2, std**2)]
            bar.update(len(rows))
    if told.tolist() != [m.captions, m.caption_tokens]:
        raise DataError(
            f"{METADATA_FILE} counts {m.captions} captions of {m.caption_tokens} tokens, but its records "
            f"{told.tolist()}"
        )
    mean, square, variance = sums / (m.count * np.prod(m.moments_shape[:3]))
    for name, found in (("mean", mean), ("std", np.sqrt(square - mean**2 + variance))):
        if not np.allclose(found, getattr(m, f"latent_{name}"), rtol=1e-6, atol=1e-6):
            raise DataError(f"latent_{name} of the records is {found.tolist()}, not as {METADATA_FILE} says")


def _check_records(rows: np.ndarray, moments: np.ndarray, condition: Condition, m: LatentMetadata) -> None:
    numbers = moments.reshape(len(rows), -1)
    std = np.split(moments, 2, axis=-1)[1].reshape(len(rows), -1)
    for what, good in (
        ("moments that are not finite", np.isfinite(numbers).all(axis=1)),
        ("a negative standard deviation", (std >= 0).all(axis=1)),
        (f"a label outside 0..{max(1, m.num_classes) - 1}", m.condition.fits(condition)),
    ):
        if not good.all():
            raise DataError(f"record {rows[np.argmin(good)]} has {what}")


def _check_captions(dataset: LatentDataset, rows: np.ndarray, reader: Reader, embedded: bool) -> np.ndarray:
    """How many captions these records have, and how many tokens. Raises DataError for one that is damaged."""
    told = np.zeros(2, int)
    for row, feature in dataset.records(rows):
        try:
            words = captions_in(feature)
            lengths, tokens, pooled = (
                reader.embeddings(feature) if embedded else (np.zeros(len(words), int), [], [])
            )
        except DataError as error:
            raise DataError(f"record {rows[row]}: {error}") from None
        if len(lengths) != len(words):
            raise DataError(f"record {rows[row]} has {len(words)} captions, but embeddings of {len(lengths)}")
        if not all(np.isfinite(np.asarray(part, np.float32)).all() for part in (tokens, pooled)):
            raise DataError(f"record {rows[row]} has an embedding that is not finite")
        told += [len(words), int(lengths.sum())]
    return told


def describe(m: LatentMetadata) -> str:
    """The metadata for a person to read, one fact a line."""
    names = (
        f" ({', '.join(m.label_names[:5])}{', ...' if len(m.label_names) > 5 else ''})"
        if m.label_names
        else ""
    )
    h, w, c = m.latent_shape
    lines = [
        ("source", f"{m.source}, {m.source_count} records"),
        ("stored", f"{m.count} records in {m.num_shards} shards, {sum(m.shard_bytes) / 1e6:.1f} MB"),
        ("skipped", f"{len(m.skipped)}"),
        ("classes", f"{m.num_classes}{names}"),
        (
            "images",
            f"{m.image_size}x{m.image_size}, crop {m.crop}, mirrors {'stored' if m.mirrors else 'not stored'}",
        ),
        (
            "latents",
            f"{h}x{w}x{c} {m.dtype}, scaling factor {m.scaling_factor:g}, shift factor {m.shift_factor:g}",
        ),
        ("mean", " ".join(f"{x:.4f}" for x in m.latent_mean)),
        ("std", " ".join(f"{x:.4f}" for x in m.latent_std)),
        ("vae", f"{m.vae} ({m.vae_backend}, {m.precision}), weights {m.vae_hash[:12]}"),
        ("version", str(m.version)),
    ]
    if m.text is not None:
        lines += [("captions", _of_captions(m, m.text))]
    bad = [f"  {name}: {reason}" for name, reason in m.skipped]
    return "\n".join([f"{name + ':':9} {value}" for name, value in lines] + bad)


def _of_captions(m: LatentMetadata, text: StoredText) -> str:
    words = f"{m.captions}, {m.captions / max(m.count, 1):.1f} a record"
    if not text.encoder:
        return f"{words}, not embedded"
    pooled = f" and {text.pooled} pooled" if text.pooled else ""
    mean = m.caption_tokens / max(m.captions, 1)
    return (
        f"{words}, embedded by {text.encoder}, weights {text.weights[:12]}: {mean:.1f} of at most {text.length} "
        f"tokens, {text.channels} channels{pooled}, {text.dtype}"
    )


def sample_sheet(
    dataset: LatentDataset, file: str | os.PathLike[str], vae: str = "", count: int = 32
) -> None:
    """Write a PNG of `count` records, evenly spread over the set, decoded from their posterior's mean.

    Where mirrors are stored, each stands to the right of its image; under an image its first caption. vae: where the
    autoencoder lies, if not where the metadata says. Raises DataError where it is not the one that encoded the set.
    """
    from dit_jax.interop.diffusers import load_autoencoder_kl, weights_hash

    m = dataset.metadata
    place = vae or m.vae
    try:
        if weights_hash(place) != m.vae_hash:
            raise DataError(f"{place} is not the autoencoder of this dataset ({m.vae}): its weights differ")
        model, params = load_autoencoder_kl(place)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{error}; --vae names the place of the dataset's autoencoder") from None
    rows = np.unique(np.linspace(0, m.count - 1, min(count, m.count)).astype(np.int64))
    moments = dataset.read(rows)["moments"]  # (n, M, h, w, 2c)
    mean = np.split(moments.astype(np.float32), 2, axis=-1)[0]

    @jax.jit
    def decode(params: Any, z: jax.Array) -> Any:
        return model.apply({"params": params}, z, method="decode")

    pictures = [to_uint8(np.asarray(decode(params, views))) for views in mean]
    try:
        save_grid(file, np.concatenate(pictures), COLUMNS, _first_captions(dataset, rows))
    except OSError as error:
        raise DataError(f"--out is {str(file)!r}, which cannot be written: {error}") from None


def _first_captions(dataset: LatentDataset, rows: np.ndarray) -> list[str] | None:
    """A text for every view of these records; None for a set without captions."""
    if dataset.metadata.text is None:
        return None
    mirrors = [""] * (dataset.metadata.moments_shape[0] - 1)
    return [text for words in dataset.captions(rows) for text in (words[0], *mirrors)]
