"""Where images come from: a source by its name, and those that lie in memory: the digits, an .npz file.

Legend: N images, H, W height and width.
"""

from __future__ import annotations

import collections
import hashlib
import io
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
from PIL import Image, ImageOps

from dit_jax import paths
from dit_jax.data.metadata import DataError

# Files of other kinds in a folder are not taken for images.
EXTENSIONS = frozenset(
    [".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"]
)


MAX_LABEL = (
    2**31 - 2
)  # a label is an int32, and so is the number after the last one, which stands for no label


class BadImageError(Exception):
    """One record cannot be decoded; the message says why."""


class Source(Protocol):
    """Images with labels, by index, in a fixed order. Worker processes get a pickled copy."""

    name: str
    """As in the metadata, such as `folder:flowers`."""
    num_classes: int
    """0 for an unlabelled source."""
    label_names: tuple[str, ...]
    """Name of each class; empty where there are none."""
    in_memory: bool
    """Decoded already: worker processes would only copy it."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """SHA-256 over what identifies the records: their names and sizes, or their bytes."""

    def id(self, index: int) -> str:
        """A name by which a person finds the record."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The record as an RGB image and its label (0 without labels). Raises BadImageError."""

    has_captions: bool
    """Whether captions are stored."""

    def captions(self, index: int) -> Sequence[str]:
        """The record's captions, where there are any. Raises BadImageError for one without."""


def open_source(
    name: str,
    split: str = "train",
    tfds_data_dir: str | None = None,
    captions: bool = True,
    caption_field: str = "",
) -> Source:
    """The source of that name: `digits`, `digits-text`, `folder:PATH`, `npz:PATH`, `tar:PATH`, `tfds:NAME` or
    `tfds:PATH`.

    split, tfds_data_dir: of a TFDS dataset (and `split` of the digits). captions: False leaves them out.
    caption_field: where they stand (empty: where they usually do; a TFDS dataset has none then). Raises DataError
    where there is no such source, it is not what it should be or it has no such field.
    """
    source = _open(name, split, tfds_data_dir, caption_field if captions else None)
    for label_name, times in collections.Counter(source.label_names).items():
        if times > 1:
            raise DataError(
                f"{source.name} has {times} classes of the name {label_name!r}; expected another name for each class"
            )
    if caption_field and captions and not source.has_captions:
        raise DataError(f"--caption-field is {caption_field}, but {source.name} has no such captions")
    source.has_captions = source.has_captions and captions
    return source


def _open(name: str, split: str, tfds_data_dir: str | None, caption_field: str | None) -> Source:
    """caption_field: None where captions are not asked for."""
    kind, _, rest = name.partition(":")
    path = paths.from_user(rest, pattern=True)
    if name in ("digits", "digits-text"):
        return _embedded(name, split)
    if kind == "folder" and rest:
        from dit_jax.data.folders import FolderSource

        return FolderSource(path, caption_field)
    if kind == "npz" and rest:
        return npz_source(path)
    if kind == "tar" and rest:
        from dit_jax.data.tars import TarSource

        return TarSource(path, caption_field)
    if kind == "tfds" and rest:
        from dit_jax.data.tfds_source import TfdsSource

        return TfdsSource(rest, split, tfds_data_dir, caption_field or "")
    raise DataError(
        f"--source is {name!r}; expected digits, folder:PATH, npz:PATH, tar:PATH, tfds:NAME, tfds:PATH or digits-text"
    )


def _embedded(name: str, split: str) -> ArraySource:
    if split not in ("train", "test"):
        raise DataError(f"--split is {split!r}; expected train or test for the digits")
    part: Literal["train", "test"] = "test" if split == "test" else "train"
    if name == "digits":
        from dit_jax.data.digits import load_digits

        images, labels = load_digits(part)
        return ArraySource(f"digits/{split}", images, labels, tuple("0123456789"))
    from dit_jax.data.digits_text import TRAINING_PICTURES, make

    made = make(TRAINING_PICTURES, 0, part)
    return ArraySource(f"digits-text/{split}", made.images, captions=made.captions)


def decode_rgb(data: bytes) -> Image.Image:
    """An encoded picture as an upright 8-bit RGB image.

    EXIF orientation is applied, transparency is laid on white, 16-bit gray is scaled (Pillow would clip it) and
    of an animation the first frame is taken. Raises BadImageError.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image, np.float64) / 257 + 0.5).clip(0, 255).astype(np.uint8))
        if image.mode == "F":
            raise BadImageError("pixels are floating-point numbers of unknown range")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except BadImageError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        # Pillow names the in-memory file by its address, which would differ between runs.
        raise BadImageError(f"{type(error).__name__}: {error}".split(" <_io")[0]) from None


class ArraySource:
    """Images (N, H, W, 3) or (N, H, W) uint8 in memory and labels (N,), or none."""

    in_memory = True

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        label_names: tuple[str, ...] = (),
        captions: Sequence[Sequence[str]] = (),
    ):
        self.name, self.label_names = name, label_names
        self.images, self.labels, self._captions = images, labels, captions
        self.has_captions = bool(captions)
        self.num_classes = len(label_names) or (0 if labels is None else int(labels.max()) + 1)

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        labels = b"" if self.labels is None else self.labels.astype(np.int64).tobytes()
        captions = [repr(tuple(said)).encode() for said in self._captions] if self.has_captions else []
        return sha256([self.images.tobytes(), labels, *captions])

    def id(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> tuple[Image.Image, int]:
        label = 0 if self.labels is None else int(self.labels[index])
        return Image.fromarray(self.images[index]).convert("RGB"), label

    def captions(self, index: int) -> Sequence[str]:
        return self._captions[index]


def npz_source(path: pathlib.Path) -> ArraySource:
    """`images` (N, H, W, 3) or (N, H, W) uint8 of an .npz file, with `labels` (N,) and `label_names` if there."""
    if not paths.is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"npz:{path} is a folder, a pipe or a device; expected a file")
    try:
        with paths.local_file(path) as here, zipfile.ZipFile(here), np.load(here) as file:
            # Without the zip np.load would take other files for arrays or pickles.
            arrays = {name: file[name] for name in ("images", "labels", "label_names") if name in file.files}
            names = file.files
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"npz:{path} cannot be read: {error}") from None
    images, labels = arrays.get("images"), arrays.get("labels")
    if images is None:
        raise DataError(
            f"npz:{path} has the arrays {', '.join(names) or 'none'}; expected images, and labels if any"
        )
    if images.dtype != np.uint8 or images.shape[3:] not in ((), (3,)) or images.ndim < 3 or not images.size:
        raise DataError(
            f"npz:{path}: images have shape {images.shape} and type {images.dtype}; expected (N, H, W, 3) or "
            "(N, H, W) uint8"
        )
    if labels is not None and (
        labels.shape != images.shape[:1]
        or labels.dtype.kind not in "iu"
        or (labels.size and labels.min() < 0)
    ):
        raise DataError(
            f"npz:{path}: labels have shape {labels.shape} and type {labels.dtype}; expected {images.shape[:1]} "
            "integers from 0 on, one for each image"
        )
    if labels is not None and labels.size and labels.max() > MAX_LABEL:
        raise DataError(
            f"npz:{path}: labels reach {labels.max()}; expected class numbers from 0 to {MAX_LABEL}"
        )
    label_names = tuple(map(str, np.ravel(arrays.get("label_names", ()))))
    if label_names and (labels is None or (labels.size and labels.max() >= len(label_names))):
        raise DataError(f"npz:{path}: {len(label_names)} label_names do not cover the labels")
    return ArraySource(f"npz:{path.name}", images, labels, label_names)


def sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
