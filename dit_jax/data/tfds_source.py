"""TFDS datasets as sources of pictures, labels and captions."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dit_jax.data.metadata import DataError
from dit_jax.data.sources import BadImageError, decode_rgb, sha256


class TfdsSource:
    """The features `image` and `label` of a TFDS dataset in a random-access format; needs no TensorFlow.

    name: a dataset's name, or the folder that holds its dataset_info.json. caption_field: the feature that holds
    captions, such as `caption`, or `captions/text` of a sequence of features (empty: none).
    """

    in_memory = False

    def __init__(self, name: str, split: str, data_dir: str | None = None, caption_field: str = ""):
        import tensorflow_datasets as tfds

        builder = _tfds_builder(name, data_dir)
        features: dict[str, Any] = dict(builder.info.features or {})
        if split not in builder.info.splits:
            found = (
                ", ".join(builder.info.splits)
                or f"none: run tfds build {name} --file_format=array_record first"
            )
            raise DataError(f"--split is {split}; tfds:{name} has the splits {found}")
        if "image" not in features:
            raise DataError(
                f"tfds:{name} has the features {', '.join(features)}; expected image, and label if any"
            )
        try:
            self._records = builder.as_data_source(
                split=split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise DataError(
                f"tfds:{name} has no random access; expected the format array_record: {error}"
            ) from None
        label = features.get("label")
        self.name = f"tfds:{builder.info.full_name}/{split}"
        self.num_classes = getattr(label, "num_classes", None) or 0
        self.label_names = tuple(getattr(label, "names", ()))
        self._caption_path = tuple(filter(None, caption_field.split("/")))
        self.has_captions = bool(self._caption_path)
        if self.has_captions:
            _check_captions(f"tfds:{name}", features, caption_field)

    def __len__(self) -> int:
        return len(self._records)

    def fingerprint(self) -> str:
        captions = ["/".join(self._caption_path).encode()] if self.has_captions else []
        return sha256([f"{self.name}\0{len(self)}".encode(), *captions])

    def id(self, index: int) -> str:
        return f"{self.name}/{index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        record = self._records[index]
        return decode_rgb(record["image"]), int(record["label"]) if self.num_classes else 0

    def captions(self, index: int) -> Sequence[str]:
        found: Any = self._records[index]
        for part in self._caption_path:
            found = found[part]  # of a sequence of features TFDS gives a dict of sequences
        values = np.ravel(np.asarray(found, object)).tolist()
        try:
            return [value.decode() if isinstance(value, bytes) else str(value) for value in values]
        except UnicodeDecodeError:
            raise BadImageError("its caption is no text that is UTF-8") from None


def _check_captions(name: str, features: dict[str, Any], field: str) -> None:
    """Raises DataError where the features have no text of that name."""
    import tensorflow_datasets as tfds

    here: Any = features
    for part in filter(None, field.split("/")):
        inner = getattr(here, "feature", here)
        if not hasattr(inner, "keys") or part not in inner:
            known = ", ".join(inner) if hasattr(inner, "keys") else "no features of its own"
            raise DataError(f"--caption-field is {field}; {name} has there {known}")
        here = inner[part]
    here = getattr(here, "feature", here)
    if not isinstance(here, tfds.features.Text):
        raise DataError(f"--caption-field is {field}, which in {name} is no text; expected a feature of text")


def _tfds_builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    folder = pathlib.Path(os.path.expanduser(name))
    if (folder / "dataset_info.json").is_file():
        return tfds.builder_from_directory(folder)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError):
        raise DataError(
            f"--source names tfds:{name}, which is neither a TFDS dataset nor a folder with dataset_info.json"
        ) from None
