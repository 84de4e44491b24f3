"""Where images come from: digits, a folder of pictures, an .npz file, a TFDS dataset.

Legend: N images, H, W height and width.
"""

from __future__ import annotations

import collections
import hashlib
import io
import os
import pathlib
import stat
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image, ImageOps

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


def open_source(name: str, split: str = "train", tfds_data_dir: str | None = None) -> Source:
    """The source of that name: `digits`, `folder:PATH`, `npz:PATH`, `tfds:NAME` or `tfds:PATH`.

    split, tfds_data_dir: of a TFDS dataset (and `split` of the digits). Raises DataError where there is no such
    source or it is not what it should be.
    """
    source = _open(name, split, tfds_data_dir)
    for label_name, times in collections.Counter(source.label_names).items():
        if times > 1:
            raise DataError(
                f"{source.name} has {times} classes of the name {label_name!r}; expected another name for each class"
            )
    return source


def _open(name: str, split: str, tfds_data_dir: str | None) -> Source:
    kind, _, rest = name.partition(":")
    if name in ("digits", "digits-text"):
        return _embedded(name, split)
    if kind == "folder" and rest:
        return FolderSource(pathlib.Path(os.path.expanduser(rest)))
    if kind == "npz" and rest:
        return npz_source(pathlib.Path(os.path.expanduser(rest)))
    if kind == "tfds" and rest:
        return TfdsSource(rest, split, tfds_data_dir)
    raise DataError(f"--source is {name!r}; expected digits, folder:PATH, npz:PATH, tfds:NAME or tfds:PATH")


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
        return _sha256([self.images.tobytes(), labels, *captions])

    def id(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> tuple[Image.Image, int]:
        label = 0 if self.labels is None else int(self.labels[index])
        return Image.fromarray(self.images[index]).convert("RGB"), label

    def captions(self, index: int) -> Sequence[str]:
        return self._captions[index]


def npz_source(path: pathlib.Path) -> ArraySource:
    """`images` (N, H, W, 3) or (N, H, W) uint8 of an .npz file, with `labels` (N,) and `label_names` if there."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"npz:{path} is a folder, a pipe or a device; expected a file")
    try:
        zipfile.ZipFile(path).close()  # np.load would take other files for arrays or pickles
        with np.load(path) as file:
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


class FolderSource:
    """Pictures in a folder: each subfolder is a class, or, without subfolders, all are unlabelled.

    A class holds every picture below its subfolder; the classes are numbered in the order of their names.
    Subfolders without pictures are no classes; hidden files and files of other kinds are left out.
    """

    in_memory = False
    has_captions = False

    def __init__(self, path: pathlib.Path):
        if not os.path.isdir(path):
            raise DataError(
                f"folder:{path} is not a folder; expected one with a subfolder of pictures per class"
            )
        self.path, self.name = path, f"folder:{_readable(path.resolve().name)}"
        self.files = sorted(_pictures(path), key=os.fsencode)
        folders = [file.split("/")[0] for file in self.files if "/" in file]
        if not self.files:
            known = " ".join(sorted(EXTENSIONS))
            raise DataError(f"folder:{path} holds no pictures; expected files ending in {known}")
        if 0 < len(folders) < len(self.files):
            loose = next(file for file in self.files if "/" not in file)
            raise DataError(
                f"folder:{path} has pictures in subfolders and {len(self.files) - len(folders)} beside them, such as "
                f"{loose}; expected either a subfolder per class or no subfolders"
            )
        classes = sorted(set(folders), key=os.fsencode)
        self.label_names = tuple(map(_readable, classes))
        self.num_classes = len(classes)
        number = {name: index for index, name in enumerate(classes)}
        self.labels = [number[folder] for folder in folders] or [0] * len(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        sizes = [_size(self.path / file) for file in self.files]
        return _sha256(os.fsencode(f"{file}\0{size}\0") for file, size in zip(self.files, sizes, strict=True))

    def id(self, index: int) -> str:
        return _readable(self.files[index])

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            data = (self.path / self.files[index]).read_bytes()
        except OSError as error:  # the disk's trouble, not the picture's: never skipped
            raise _unreadable(error) from None
        return decode_rgb(data), self.labels[index]

    def captions(self, index: int) -> Sequence[str]:
        return ()


def _readable(name: str) -> str:
    """A file's name as text that can be written and printed; bytes that are no UTF-8 become \\x escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{_readable(str(error.filename))} cannot be read: {error.strerror}")


def _size(file: pathlib.Path) -> int:
    """Bytes of a file; DataError for one that is none: reading a pipe or a device may never end."""
    try:
        found = file.stat()
    except OSError as error:
        raise _unreadable(error) from None
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{_readable(str(file))} is a pipe or a device, or a link to one; expected a picture")
    return found.st_size


def _pictures(path: pathlib.Path) -> Iterable[str]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error)

    for folder, subfolders, names in os.walk(path, onerror=refuse, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for link in (os.path.join(folder, name) for name in subfolders):
            if os.path.islink(link) and pathlib.Path(folder).resolve().is_relative_to(os.path.realpath(link)):
                raise DataError(f"{_readable(link)} is a link to a folder that it lies in; expected none")
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield os.path.relpath(os.path.join(folder, name), path).replace(os.sep, "/")


class TfdsSource:
    """The features `image` and `label` of a TFDS dataset in a random-access format; needs no TensorFlow.

    name: a dataset's name, or the folder that holds its dataset_info.json.
    """

    in_memory = False
    has_captions = False

    def __init__(self, name: str, split: str, data_dir: str | None = None):
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

    def __len__(self) -> int:
        return len(self._records)

    def fingerprint(self) -> str:
        return _sha256([f"{self.name}\0{len(self)}".encode()])

    def id(self, index: int) -> str:
        return f"{self.name}/{index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        record = self._records[index]
        return decode_rgb(record["image"]), int(record["label"]) if self.num_classes else 0

    def captions(self, index: int) -> Sequence[str]:
        return ()


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


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
