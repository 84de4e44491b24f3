"""Captions of a batch of examples to what is stored of them.

Legend: n tokens of a caption, E channels, K captions of an example, F channels of the pooled text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 by it)
import numpy as np

from dit_jax.config import ConfigError
from dit_jax.config.text import BYTES, SD3, TextConfig
from dit_jax.data.decode import Example
from dit_jax.data.metadata import DataError, EmbeddingType, StoredText
from dit_jax.data.records import Captions
from dit_jax.text.encoders import Embedded, TextEncoder, open_encoder

WORDS = StoredText()


@dataclass(frozen=True)
class Embedder:
    """Who makes numbers of captions, with what the metadata says of it; without an encoder words alone are stored."""

    stored: StoredText = WORDS
    encoder: TextEncoder | None = None

    def captions(self, examples: Sequence[Example]) -> list[Captions]:
        """What is stored of the examples' captions. Raises DataError for numbers that are not finite."""
        if self.encoder is None:
            return [Captions(example.captions) for example in examples]
        found = iter(self.encoder.encode([said for example in examples for said in example.captions]))
        return [self._of(example, [next(found) for _ in example.captions]) for example in examples]

    def _of(self, example: Example, embedded: Sequence[Embedded]) -> Captions:
        tokens = tuple(self._narrowed(example, part.tokens) for part in embedded)
        pooled = [self._narrowed(example, part.pooled) for part in embedded if part.pooled is not None]
        return Captions(example.captions, tokens, np.stack(pooled) if pooled else None)

    def _narrowed(self, example: Example, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            narrow = values.astype(self.stored.dtype)
        if not np.isfinite(narrow.astype(np.float32)).all():
            raise DataError(
                f"the embedding of a caption of {example.id} is not finite in {self.stored.dtype}; expected finite "
                "numbers: try --text-dtype bfloat16"
            )
        return narrow


def open_embedder(encoder: str, place: str | None, length: int | None, dtype: EmbeddingType) -> Embedder:
    """The embedder that prepare.py's options name: of `encoder` "" and "bytes" one that keeps words alone.

    place: where the encoder's files lie (None: where its name says). length: None for the encoder's default. Raises
    ConfigError where there is no such encoder.
    """
    if encoder in ("", BYTES):
        if length is not None:
            raise DataError(
                f"--text-length is {length}, but --text-encoder stores words alone; expected an encoder that embeds"
            )
        return Embedder()
    length = TextConfig(encoder=encoder).filled().length if length is None else length
    assert length is not None
    try:
        opened = open_encoder(encoder, length, place)
    except ConfigError as error:
        raise DataError(f"--text-encoder: {error}") from None
    widths = opened.clip_widths if encoder == SD3 else (0, 0)
    return Embedder(
        StoredText(
            encoder,
            opened.fingerprint,
            opened.length,
            opened.channels,
            opened.pooled,
            widths,
            dtype,
            place or "",
        ),
        opened,
    )
