"""Several datasets as one, each with a weight: what they must have in common, and reading them.

Their records are numbered one part after the other; `dit_jax.data.order.MixedOrder` draws among the parts.

Legend: n records asked for, M views, h, w latent height and width, c latent channels, K parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_jax.conditions import AnyCondition, TextCondition
from dit_jax.config import ConfigError
from dit_jax.config.text import BYTES
from dit_jax.data.captions import Reader
from dit_jax.data.metadata import LatentMetadata, StoredText

if TYPE_CHECKING:
    from dit_jax.data.latents import LatentDataset


LATENTS = "latents of (height, width, channels)"


def check_parts(
    folders: Sequence[str], found: Sequence[LatentMetadata], kind: AnyCondition, several_sizes: bool = False
) -> None:
    """Raises ConfigError, naming the part and what differs, where sets cannot be mixed for this condition.

    several_sizes: latents need not have the same height and width.
    """
    wanted: dict[str, tuple[Any, str]] = {}
    for folder, metadata in zip(folders, found, strict=True):
        if metadata.count == 0:
            raise ConfigError(f"--data.mixture: {folder} is empty; expected at least one record")
        for what, value in _facts(metadata, kind, several_sizes).items():
            before, where = wanted.setdefault(what, (value, folder))
            if value != before:
                raise ConfigError(
                    f"--data.mixture: {folder} has {what} {_shown(value)}, but {where} has {_shown(before)}; "
                    "expected the same of all parts" + (", or --data.sizes" if what == LATENTS else "")
                )


def _facts(m: LatentMetadata, kind: AnyCondition, several_sizes: bool) -> dict[str, Any]:
    """What all parts must have in common, by its name in a sentence."""
    facts: dict[str, Any] = {
        **({} if several_sizes else {LATENTS: m.latent_shape}),
        "type": m.dtype,
        "autoencoder": (m.vae, m.vae_hash[:12]) if not m.vae_hash else m.vae_hash[:12],
        "scaling and shift factor": (m.scaling_factor, m.shift_factor),
    }
    if not isinstance(kind, TextCondition) and kind.num_classes:
        facts |= {"classes": m.num_classes} | ({"class names": m.label_names} if m.label_names else {})
    if _embedded(kind) and m.text:
        facts["text embeddings"] = dataclasses.replace(m.text, place="")
    return facts


def _embedded(kind: AnyCondition) -> bool:
    return isinstance(kind, TextCondition) and kind.encoder != BYTES


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def joined(
    parts: Sequence[LatentMetadata], weights: Sequence[float], kind: AnyCondition, main: int = 0
) -> LatentMetadata:
    """The metadata of a mixture: what the parts have in common, sums of their counts, and a hash of them all.

    main: the part whose size the mixture is said to have.
    """
    first = parts[main]
    identity = "\n".join(f"{w!r} {m.to_json()}" for w, m in zip(weights, parts, strict=True))
    shares = np.array(weights) / np.sum(weights)
    mean = shares @ np.array([m.latent_mean for m in parts])  # (c,)
    square = shares @ np.array([np.square(m.latent_std) + np.square(m.latent_mean) for m in parts])
    sources, text = list(dict.fromkeys(m.source for m in parts)), first.text
    if text and not _embedded(kind) and any(m.text != text for m in parts):
        text = StoredText() if all(m.text for m in parts) else None  # what they all have: words, or none
    return dataclasses.replace(
        first,
        source=sources[0] if len(sources) == 1 else f"mixture of {' + '.join(sources)}",
        source_hash=hashlib.sha256(identity.encode()).hexdigest(),
        source_count=sum(m.source_count for m in parts),
        mirrors=all(m.mirrors for m in parts),
        count=sum(m.count for m in parts),
        label_names=next((m.label_names for m in parts if m.label_names), ()),
        latent_mean=tuple(mean.tolist()),
        latent_std=tuple(np.sqrt(square - np.square(mean)).tolist()),
        skipped=(), shard_counts=(), shard_bytes=(), shard_sha256=(),
        text=text,
        captions=sum(m.captions for m in parts) if text else 0,
        caption_tokens=sum(m.caption_tokens for m in parts) if text else 0,
    )  # fmt: skip


class Mixture:
    """Several `LatentDataset`s with weights, read as one; safe to read from many threads.

    Where their latents have several sizes, what is read at once must be of one; `size` is that of the base shape.
    """

    def __init__(
        self,
        parts: Sequence[LatentDataset],
        weights: Sequence[float],
        size: tuple[int, int] | None = None,
    ):
        self.parts, self.weights = tuple(parts), tuple(weights)
        sizes = [part.metadata.latent_shape[:2] for part in parts]
        self.several_sizes = len(set(sizes)) > 1
        self.condition: AnyCondition = parts[0].condition
        main = sizes.index(size) if size else 0
        self.metadata = joined([part.metadata for part in parts], weights, self.condition, main)
        self.conditions = Reader(self.condition, self.metadata)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return self.metadata.count

    def __repr__(self) -> str:
        return f"Mixture of {len(self.parts)} datasets, {len(self)} records"

    @property
    def record_shape(self) -> tuple[int, int, int, int]:
        """(M, h, w, 2c) of the moments that `read` returns, of one size."""
        return self.parts[0].record_shape

    @property
    def record_bytes(self) -> int:
        """Bytes of one record's moments as `read` returns them, of the largest."""
        return max(part.record_bytes for part in self.parts)

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        words: np.ndarray | None = None,
        readers: Sequence[Callable[..., dict[str, np.ndarray]]] = (),
    ) -> dict[str, np.ndarray]:
        """As `LatentDataset.read`; readers: those of the parts, where they are not their own."""
        readers = readers or [part.read for part in self.parts]
        rows = np.asarray(indices, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"indices {rows.min()}..{rows.max()} reach outside {self!r}")
        arrays: dict[str, np.ndarray] = {}
        of_part = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(of_part).tolist():
            here = of_part == number
            found = readers[number](rows[here] - self._first(number), None if words is None else words[here])
            for name, values in found.items():
                whole = arrays.setdefault(name, np.empty((len(rows), *values.shape[1:]), values.dtype))
                whole[here] = values
        return arrays

    def read_into(
        self, moments: np.ndarray, first: int, last: int, each: Callable[[int, Mapping[str, Any]], None]
    ) -> None:
        """As `LatentDataset.read_into`."""
        for number, begin, end in self._ranges(first, last):
            at = self._first(number)

            def put(row: int, feature: Mapping[str, Any], at: int = at) -> None:
                each(at + row, feature)

            self.parts[number].read_into(moments[at:], begin, end, put)

    def examples(self, n: int) -> tuple[dict[str, np.ndarray], list[str]]:
        """As `LatentDataset.examples`, spread evenly over the records of all parts."""
        rows = np.linspace(0, len(self), n, endpoint=False).astype(np.int64)
        counts = np.bincount(np.searchsorted(self._ends, rows, side="right"), minlength=len(self.parts))
        found = [
            part.examples(count) for part, count in zip(self.parts, counts.tolist(), strict=True) if count
        ]
        conditions = [condition for condition, _ in found]
        return (
            {name: np.concatenate([condition[name] for condition in conditions]) for name in conditions[0]},
            [words for _, captions in found for words in captions],
        )

    def _first(self, number: int) -> int:
        """The number of a part's first record."""
        return int(self._ends[number]) - len(self.parts[number])

    def _ranges(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(part, its first record, its last plus one) of records first..last - 1."""
        for number, part in enumerate(self.parts):
            at = self._first(number)
            begin, end = max(first - at, 0), min(last - at, len(part))
            if begin < end:
                yield number, begin, end
