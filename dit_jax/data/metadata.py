"""What a latent dataset is: metadata.json beside its shards, and the shards' names and records.

A dataset is a folder that plain TFDS opens with `builder_from_directory`: ArrayRecord shards of
tf.train.Example with `moments` (mean then standard deviation of the VAE's posterior, raw bytes), `label` and
`id`.

Legend: M views (1, or 2 with the mirror image), h, w latent height and width, c latent channels.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dit_jax.conditions import Condition, Field, LabelCondition
from dit_jax.config import ConfigError

VERSION = 1
METADATA_FILE = "metadata.json"
MomentsType = Literal["float16", "float32"]


class DataError(ConfigError):
    """A source or a dataset is damaged, unfinished, or contradicts what was asked for."""


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
        """What the records hold beside the latents."""
        return LabelCondition(self.num_classes)

    def to_json(self) -> str:
        """Indented JSON; `from_json` reads it back to an equal value."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

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
            cls.__pydantic_config__ = strict  # type: ignore[attr-defined]
            return pydantic.TypeAdapter(cls).validate_json(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{name} is not JSON: {error}") from None
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(f"{name}: {where}: {first['msg'].lower()}") from None


RESULTS = ("count", "latent_mean", "latent_std", "skipped", "shard_counts", "shard_bytes", "shard_sha256")


def recipe(metadata: LatentMetadata) -> dict[str, Any]:
    """The part of the metadata that is known before anything is encoded."""
    return {key: value for key, value in dataclasses.asdict(metadata).items() if key not in RESULTS}


def shard_name(index: int, num_shards: int) -> str:
    """File name of a shard, in TFDS's pattern."""
    return f"latents-train.array_record-{index:05d}-of-{num_shards:05d}"


def load_metadata(directory: str | os.PathLike[str]) -> LatentMetadata:
    """The metadata of a finished dataset. Raises DataError where there is none."""
    file = pathlib.Path(directory) / METADATA_FILE
    if not os.path.isfile(file):
        state = "holds no finished latent dataset" if os.path.isdir(directory) else "does not exist"
        raise DataError(
            f"{directory} {state} (no {METADATA_FILE}); make one with "
            f"python prepare.py --source folder:PICTURES --vae VAE --out {directory}"
        )
    return LatentMetadata.from_json(file.read_text(), str(file))


# ------------------------------------------------------------------------------------------- records


def tfds_features(metadata: LatentMetadata) -> Any:
    """The `tfds.features.FeaturesDict` of a record."""
    import tensorflow_datasets as tfds

    condition = {
        name: tfds.features.Tensor(shape=field.shape, dtype=np.int64)
        if field.shape
        else tfds.features.Scalar(np.int64)
        for name, field in metadata.condition.fields.items()
    }
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            **condition,
            "moments": tfds.features.Tensor(
                shape=metadata.moments_shape,
                dtype=np.dtype(metadata.dtype),
                encoding=tfds.features.Encoding.BYTES,
            ),
        }
    )


def serialize(name: str, condition: Condition, moments: np.ndarray) -> bytes:
    """A record: the tf.train.Example that TFDS' own serializer makes of id, condition and moments, but faster."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    feature = {
        "id": tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[os.fsencode(name)])),
        "moments": tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[moments.tobytes()])),
    }
    for key, value in condition.items():
        numbers = tf_feature_pb2.Int64List(value=np.ravel(value).tolist())
        feature[key] = tf_feature_pb2.Feature(int64_list=numbers)
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature))
    return example.SerializeToString(deterministic=True)  # the order of a map's entries is otherwise free


def parse(record: bytes, fields: Mapping[str, Field]) -> tuple[bytes, Condition, bytes]:
    """(id, condition of these fields, the moments' bytes) of a record."""
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(record).features.feature
    condition: Condition = {}
    for key, field in fields.items():
        numbers = feature[key].int64_list.value
        condition[key] = np.reshape(numbers, field.shape) if field.shape else numbers[0]
    return feature["id"].bytes_list.value[0], condition, feature["moments"].bytes_list.value[0]


def write_tfds_metadata(directory: pathlib.Path, metadata: LatentMetadata) -> None:
    """dataset_info.json and features.json, by which plain TFDS opens the folder."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, naming

    template = naming.ShardedFileTemplate(
        data_dir=directory,
        template=naming.DEFAULT_FILENAME_TEMPLATE,
        dataset_name="latents",
        filetype_suffix="array_record",
        split="train",
    )
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=list(metadata.shard_counts),
        num_bytes=sum(metadata.shard_bytes),
        filename_template=template,
    )
    info = tfds.core.DatasetInfo(
        builder=dataset_info.DatasetIdentity(
            name="latents", version=tfds.core.Version("1.0.0"), data_dir=os.fspath(directory), module_name=""
        ),
        features=tfds_features(metadata),
        description=f"Moments of the VAE posterior of {metadata.source}; see {METADATA_FILE}.",
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(directory)
