"""The records of a latent dataset: tf.train.Example that plain TFDS reads.

`moments` (mean then standard deviation of the VAE's posterior, raw bytes), `label` and `id`. With captions also
`captions`, and of those that are embedded `embeddings` (all tokens of all captions, one after the other, raw bytes),
`embedding_lengths` (tokens of each caption) and `pooled`, where the encoder pools.

Legend: K captions of a record, T tokens of all of them, E channels, F channels of the pooled text.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_jax.conditions import Condition, Field
from dit_jax.data.metadata import METADATA_FILE, LatentMetadata


@dataclass(frozen=True)
class Captions:
    """The captions of a record, and their embeddings where an encoder made them."""

    words: tuple[str, ...] = ()
    embeddings: tuple[np.ndarray, ...] = ()
    """(n, E) of each caption, in the stored type."""
    pooled: np.ndarray | None = None
    """(K, F), in the stored type."""

    @property
    def tokens(self) -> int:
        """T."""
        return sum(map(len, self.embeddings))


NO_CAPTIONS = Captions()


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
            **_caption_features(metadata),
            "moments": tfds.features.Tensor(
                shape=metadata.moments_shape,
                dtype=np.dtype(metadata.dtype),
                encoding=tfds.features.Encoding.BYTES,
            ),
        }
    )


def _caption_features(metadata: LatentMetadata) -> dict[str, Any]:
    import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 by it)
    import tensorflow_datasets as tfds

    text = metadata.text
    if text is None:
        return {}
    found: dict[str, Any] = {"captions": tfds.features.Sequence(tfds.features.Text())}
    if not text.encoder:
        return found

    def numbers(*shape: int | None) -> Any:
        return tfds.features.Tensor(
            shape=shape, dtype=np.dtype(text.dtype), encoding=tfds.features.Encoding.BYTES
        )

    found["embeddings"] = numbers(None, text.channels)
    found["embedding_lengths"] = tfds.features.Tensor(shape=(None,), dtype=np.int64)
    return found | ({"pooled": numbers(None, text.pooled)} if text.pooled else {})


def serialize(
    name: str, condition: Condition, moments: np.ndarray, captions: Captions = NO_CAPTIONS
) -> bytes:
    """A record: the tf.train.Example that TFDS' own serializer makes of these, but faster."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    def of_bytes(*value: bytes) -> Any:
        return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=value))

    feature = {"id": of_bytes(os.fsencode(name)), "moments": of_bytes(moments.tobytes())}
    numbers = dict(condition)
    if captions.words:
        feature["captions"] = of_bytes(*(words.encode() for words in captions.words))
    if captions.embeddings:
        feature["embeddings"] = of_bytes(b"".join(part.tobytes() for part in captions.embeddings))
        numbers["embedding_lengths"] = [len(part) for part in captions.embeddings]
    if captions.pooled is not None:
        feature["pooled"] = of_bytes(captions.pooled.tobytes())
    for key, value in numbers.items():
        values = tf_feature_pb2.Int64List(value=np.ravel(value).tolist())
        feature[key] = tf_feature_pb2.Feature(int64_list=values)
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature))
    return example.SerializeToString(deterministic=True)  # the order of a map's entries is otherwise free


def features_of(record: bytes) -> Mapping[str, Any]:
    """The tf.train.Features of a record."""
    from tensorflow_datasets.proto import tf_example_pb2

    found: Mapping[str, Any] = tf_example_pb2.Example.FromString(record).features.feature
    return found


def parse(record: bytes, fields: Mapping[str, Field]) -> tuple[bytes, Condition, bytes]:
    """(id, condition of these fields, the moments' bytes) of a record."""
    feature = features_of(record)
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
