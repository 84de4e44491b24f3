"""What a latent dataset is: metadata.json beside its shards, and the shards' names.

A dataset is a folder that plain TFDS opens with `builder_from_directory`: ArrayRecord shards of the records that
`dit_jax.data.records` writes.

Legend: M views (1, or 2 with the mirror image), h, w latent height and width, c latent channels.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any, Literal

from dit_jax import paths
from dit_jax.conditions import AnyCondition, LabelCondition, TextCondition
from dit_jax.config import ConfigError

VERSION = 1
METADATA_FILE = "metadata.json"
MomentsType = Literal["float16", "float32"]
EmbeddingType = Literal["float16", "bfloat16"]


class DataError(ConfigError):
    """A source or a dataset is damaged, unfinished, or contradicts what was asked for."""


@dataclass(frozen=True)
class StoredText:
    """What the records hold of captions: their words, and what an encoder made of them."""

    encoder: str = ""
    """Who made the embeddings, as --text.encoder names it; empty where words alone are stored."""
    weights: str = ""
    """SHA-256 of the encoder's weights."""
    length: int = 0
    """Tokens of a caption at most; an embedding is stored at its true length."""
    channels: int = 0
    """Of a token."""
    pooled: int = 0
    """Channels of the pooled text; 0 for none."""
    clip_widths: tuple[int, int] = (0, 0)
    """Of sd3: channels of CLIP-L and CLIP-G."""
    dtype: EmbeddingType = "float16"
    """Type of the stored embeddings."""
    place: str = ""
    """Where the encoder lay, a folder or a hub id; empty where its name says."""

    @property
    def condition(self) -> TextCondition:
        """What a network is told of them."""
        return TextCondition(
            self.encoder, self.length, self.channels, self.pooled, clip_widths=self.clip_widths
        )


@dataclass(frozen=True)
class LatentMetadata:
    """How a dataset was made (the recipe) and what came out (from `count` on)."""

    source: str
    """The source as given to prepare.py, such as `folder:flowers`; the last part of a path only."""
    source_hash: str
    """SHA-256 over the source's record ids and labels, in order."""
    source_count: int
    """Records of the source."""
    vae: str
    """The autoencoder: a diffusers folder, a hub id, or `digits`."""
    vae_hash: str
    """SHA-256 of the autoencoder's weights file; empty where it is not known, of other people's weights."""
    vae_backend: str
    """Which implementation encoded: flax or diffusers."""
    precision: str
    """Compute precision of the encoder."""
    scaling_factor: float
    """The network sees (z - shift_factor) * scaling_factor."""
    shift_factor: float
    latent_shape: tuple[int, int, int]
    """h, w, c."""
    image_size: int
    """Side of the square images, pixels."""
    crop: str
    """How an image became square."""
    mirrors: bool
    """Whether the moments of the mirror image are stored too."""
    dtype: MomentsType
    """Type of the stored moments."""
    num_classes: int
    """0 for an unlabelled set."""
    label_names: tuple[str, ...]
    """Name of each class; empty where the source has none."""
    shard_size: int
    """Records of the source in a shard; skipped ones leave it shorter."""
    batch_size: int
    """Images that one device encodes at once (numerics may depend on it in the last bit)."""
    version: int = VERSION
    """Of this format."""
    count: int = 0
    """Records stored."""
    latent_mean: tuple[float, ...] = ()
    """Mean of z per channel, before shift and scaling, over all views."""
    latent_std: tuple[float, ...] = ()
    """Standard deviation of z per channel: sqrt(var(mean) + E[std^2])."""
    skipped: tuple[tuple[str, str], ...] = ()
    """(id, reason) of every image that could not be decoded."""
    shard_counts: tuple[int, ...] = ()
    """Records of each shard."""
    shard_bytes: tuple[int, ...] = ()
    """Size of each shard's file."""
    shard_sha256: tuple[str, ...] = ()
    """Checksum of each shard's file."""
    text: StoredText | None = None
    """What is stored of captions; None for a set without."""
    captions: int = 0
    """Captions of all records."""
    caption_tokens: int = 0
    """Tokens of their embeddings."""

    @property
    def num_shards(self) -> int:
        """Shards, from the source's count."""
        return max(1, -(-self.source_count // self.shard_size))

    @property
    def moments_shape(self) -> tuple[int, int, int, int]:
        """(M, h, w, 2c) of one stored record."""
        h, w, c = self.latent_shape
        return (2 if self.mirrors else 1, h, w, 2 * c)

    @property
    def condition(self) -> LabelCondition:
        """The labels of the records."""
        return LabelCondition(self.num_classes)

    def stored(self, kind: AnyCondition) -> AnyCondition:
        """What the records hold of a kind of condition: captions, or labels where they have none."""
        return self.text.condition if self.text and isinstance(kind, TextCondition) else self.condition

    def to_json(self) -> str:
        """Indented JSON; `from_json` reads it back to an equal value."""
        return json.dumps(_values(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = METADATA_FILE) -> LatentMetadata:
        """Metadata from JSON; `name` is the file's, for the error.

        Raises DataError for a missing or unknown key, a wrong type or another version of the format.
        """
        import pydantic

        try:
            found = json.loads(text)
            if isinstance(found, dict) and found.get("version") != VERSION:
                raise DataError(
                    f"{name} has version {found.get('version')!r}; this program reads version {VERSION}"
                )
            strict = pydantic.ConfigDict(extra="forbid", strict=True)
            for part in (cls, StoredText):
                setattr(part, "__pydantic_config__", strict)  # noqa: B010  (no type checker knows of it)
            return pydantic.TypeAdapter(cls).validate_json(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{name} is not JSON: {error}") from None
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(f"{name}: {where}: {first['msg'].lower()}") from None


OF_CAPTIONS = ("text", "captions", "caption_tokens")  # which a set without captions does not name
RESULTS = (
    "count", "latent_mean", "latent_std", "skipped", "shard_counts", "shard_bytes", "shard_sha256", "captions",
    "caption_tokens",
)  # fmt: skip


def _values(metadata: LatentMetadata) -> dict[str, Any]:
    return {
        key: value
        for key, value in dataclasses.asdict(metadata).items()
        if metadata.text or key not in OF_CAPTIONS
    }


def recipe(metadata: LatentMetadata) -> dict[str, Any]:
    """The part of the metadata that is known before anything is encoded."""
    return {key: value for key, value in _values(metadata).items() if key not in RESULTS}


def shard_name(index: int, num_shards: int) -> str:
    """File name of a shard, in TFDS's pattern."""
    return f"latents-train.array_record-{index:05d}-of-{num_shards:05d}"


def load_metadata(directory: str | os.PathLike[str]) -> LatentMetadata:
    """The metadata of a finished dataset. Raises DataError where there is none."""
    file = paths.to_path(directory) / METADATA_FILE
    if not paths.is_file(file):
        state = "holds no finished latent dataset" if paths.is_folder(file.parent) else "does not exist"
        raise DataError(
            f"{directory} {state} (no {METADATA_FILE}); make one with "
            f"python prepare.py --source folder:PICTURES --vae VAE --out {directory}"
        )
    return LatentMetadata.from_json(paths.read_bytes(file).decode(), str(file))
