"""What a network is told of a record: its label, or one of its captions, as numbers.

Of several captions one is drawn by a word of 64 bits, a pure function of (seed, step, row of the batch): neither
cache nor devices nor hosts change it.

Legend: B batch, n records asked for, N records, C captions of all of them, K captions of a record, M tokens of a
caption at most, T tokens of all captions at their true lengths, E channels, F channels of the pooled text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 by it)
import numpy as np

from dit_jax.conditions import AnyCondition, Field, TextCondition, byte_tokens
from dit_jax.config.text import BYTES
from dit_jax.data.metadata import DataError, LatentMetadata

Arrays = dict[str, np.ndarray]
_DRAW = 0xCA97  # apart from the order of an epoch, which has a seed's own key


def caption_words(seed: int, step: int, batch_size: int) -> np.ndarray:
    """A word (B,) uint64 for each row of a step's global batch, by which its caption is drawn."""
    key = np.array([seed, 2**32 * _DRAW + step], np.uint64)
    return np.random.Philox(key=key).random_raw(batch_size)


@dataclass(frozen=True)
class Reader:
    """Reads one kind of condition from the records of a dataset."""

    kind: AnyCondition
    metadata: LatentMetadata

    @property
    def of_text(self) -> bool:
        """Whether captions are read."""
        return isinstance(self.kind, TextCondition)

    @property
    def fields(self) -> dict[str, Field]:
        """The kind's fields, in the type in which they are read: embeddings as they are stored."""
        fields = dict(self.kind.fields)
        if self.embedded and self.metadata.text:
            dtype = np.dtype(self.metadata.text.dtype)
            fields |= {
                name: Field(fields[name].shape, dtype) for name in fields.keys() & {"context", "pooled"}
            }
        return fields

    @property
    def embedded(self) -> bool:
        """Whether an encoder's embeddings are read."""
        return isinstance(self.kind, TextCondition) and self.kind.encoder != BYTES

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's condition in a batch."""
        return sum(int(np.prod(f.shape)) * np.dtype(f.dtype).itemsize for f in self.fields.values())

    @property
    def cached_bytes(self) -> int:
        """Bytes of a whole set's conditions as a cache holds them."""
        m = self.metadata
        if not self.of_text:
            return m.count * self.sample_bytes
        if not self.embedded or m.text is None:
            return m.captions * self.sample_bytes
        return (m.caption_tokens * m.text.channels + m.captions * m.text.pooled) * np.dtype(
            m.text.dtype
        ).itemsize

    def empty(self, n: int) -> Arrays:
        """Arrays for n samples; of embeddings zeros, which are padding."""
        return {name: np.zeros((n, *f.shape), f.dtype) for name, f in self.fields.items()}

    def put(self, arrays: Arrays, row: int, feature: Mapping[str, Any], word: int) -> None:
        """The condition of a record (as `features_of` gives it) to that row; `word` draws its caption."""
        if not self.of_text:
            for name, field in self.kind.fields.items():
                numbers = feature[name].int64_list.value
                arrays[name][row] = np.reshape(numbers, field.shape) if field.shape else numbers[0]
        elif self.embedded:
            lengths, tokens, pooled = self.embeddings(feature)
            chosen = word % len(lengths)
            first, n = int(lengths[:chosen].sum()), int(lengths[chosen])
            arrays["context"][row, :n] = tokens[first : first + n]
            arrays["mask"][row, :n] = True
            if "pooled" in arrays:
                arrays["pooled"][row] = pooled[chosen]
        else:
            words = captions_in(feature)
            arrays["tokens"][row] = byte_tokens([words[word % len(words)]], arrays["tokens"].shape[1])[0]

    def embeddings(self, feature: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens of each caption (K,), all tokens (T, E), pooled (K, F)) of a record; views of its bytes."""
        text = self.metadata.text
        assert text is not None
        lengths = np.asarray(feature["embedding_lengths"].int64_list.value, np.int64)
        stored = {"embeddings": (int(lengths.sum()), text.channels), "pooled": (len(lengths), text.pooled)}
        found: list[np.ndarray] = []
        for name, shape in stored.items():
            data = feature[name].bytes_list.value[0] if np.prod(shape[1:]) else b""
            if len(data) != np.prod(shape) * np.dtype(text.dtype).itemsize:
                raise DataError(f"a record has {len(data)} bytes of {name}; expected {shape} {text.dtype}")
            found.append(np.frombuffer(data, text.dtype).reshape(shape))
        if not len(lengths) or lengths.max() > text.length:
            raise DataError(
                f"a record's captions have {lengths.tolist()} tokens; expected some, of at most {text.length}"
            )
        return lengths, found[0], found[1]


def captions_in(feature: Mapping[str, Any]) -> list[str]:
    """The captions of a record; DataError where it has none."""
    found = [value.decode(errors="replace") for value in feature["captions"].bytes_list.value]
    if not found:
        raise DataError("a record has no caption; expected at least one")
    return found


# --------------------------------------------------------------------------------------------- cache


class CaptionTable:
    """The captions of a whole set in host memory, embeddings at their true lengths, to draw batches from."""

    def __init__(self, reader: Reader):
        m, self.kind = reader.metadata, reader.kind
        assert isinstance(self.kind, TextCondition)
        self.reader = reader
        self.counts = np.zeros(m.count, np.int64)  # captions of each record
        self._starts = np.zeros(m.count, np.int64)  # where they begin
        self._filled, self._tokens = 0, 0
        if self.kind.encoder == BYTES:
            self.arrays: Arrays = {"tokens": np.zeros((m.captions, self.kind.length), np.int32)}
        else:
            assert m.text is not None
            self.arrays = {
                "context": np.zeros((max(1, m.caption_tokens), m.text.channels), m.text.dtype),
                "first": np.zeros(m.captions, np.int32 if m.caption_tokens < 2**31 else np.int64),
                "length": np.zeros(m.captions, np.int32),
            }
            if m.text.pooled:
                self.arrays["pooled"] = np.zeros((m.captions, m.text.pooled), m.text.dtype)

    def add(self, index: int, feature: Mapping[str, Any]) -> None:
        """The captions of record `index`."""
        at = self._filled
        if "tokens" in self.arrays:
            words = captions_in(feature)
            count = len(words)
            self.arrays["tokens"][at : at + count] = byte_tokens(words, self.kind.length)  # type: ignore[union-attr]
        else:
            lengths, tokens, pooled = self.reader.embeddings(feature)
            count = len(lengths)
            self.arrays["context"][self._tokens : self._tokens + len(tokens)] = tokens
            self.arrays["first"][at : at + count] = self._tokens + np.cumsum(lengths) - lengths
            self.arrays["length"][at : at + count] = lengths
            if "pooled" in self.arrays:
                self.arrays["pooled"][at : at + count] = pooled
            self._tokens += len(tokens)
        self.counts[index], self._starts[index] = count, at
        self._filled += count

    def rows(self, indices: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Which captions (B,) the words draw for records (B,)."""
        return self._starts[indices] + (words % self.counts[indices].astype(np.uint64)).astype(np.int64)

    def take(self, rows: np.ndarray) -> Arrays:
        """The condition of these captions (B,), on the host."""
        if "tokens" in self.arrays:
            return {"tokens": self.arrays["tokens"][rows]}
        found, a = self.reader.empty(len(rows)), self.arrays
        for i, row in enumerate(rows.tolist()):
            first, n = int(a["first"][row]), int(a["length"][row])
            found["context"][i, :n] = a["context"][first : first + n]
            found["mask"][i, :n] = True
        if "pooled" in a:
            found["pooled"] = a["pooled"][rows]
        return found


def gather(arrays: Mapping[str, jax.Array], rows: jax.Array, length: int) -> dict[str, jax.Array]:
    """What `CaptionTable.take` gives, of its arrays on a device; inside jit."""
    if "tokens" in arrays:
        return {"tokens": arrays["tokens"][rows]}
    at = jnp.arange(length)[None]  # (1, M)
    mask = at < arrays["length"][rows][:, None]  # (B, M)
    tokens = jnp.where(mask, arrays["first"][rows][:, None] + at, 0)
    context = arrays["context"][tokens]  # (B, M, E)
    found = {"context": jnp.where(mask[..., None], context, jnp.zeros((), context.dtype)), "mask": mask}
    return found | ({"pooled": arrays["pooled"][rows]} if "pooled" in arrays else {})
