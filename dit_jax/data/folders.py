"""Pictures in a folder, with captions beside them.

Captions are those of a metadata file, as Hugging Face's imagefolder has it (metadata.jsonl or metadata.csv in a
folder, with the columns file_name and text), or else those of text files beside the pictures.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dit_jax import paths
from dit_jax.data.metadata import DataError
from dit_jax.data.sources import EXTENSIONS, BadImageError, decode_rgb, sha256

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
FIELDS = ("text", "caption", "captions")  # where captions usually stand


class FolderSource:
    """Pictures in a folder: each subfolder is a class, or, without subfolders, all are unlabelled.

    A class holds every picture below its subfolder; the classes are numbered in the order of their names.
    Subfolders without pictures are no classes; hidden files and files of other kinds are left out.

    caption_field: where captions stand, as of `find_captions`; None where none are wanted.
    """

    in_memory = False

    def __init__(self, path: pathlib.Path, caption_field: str | None = None):
        listing = Listing(path, paths.sizes_below(path) if paths.is_remote(path) else None)
        if not (listing.sizes or paths.is_folder(path)):
            raise DataError(
                f"folder:{path} is not a folder; expected one with a subfolder of pictures per class"
            )
        self.path, self.name = path, f"folder:{readable(path.resolve().name)}"
        self._listing = listing
        self.files = sorted(listing.pictures(), key=os.fsencode)
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
        self.label_names = tuple(map(readable, classes))
        self.num_classes = len(classes)
        number = {name: index for index, name in enumerate(classes)}
        self.labels = [number[folder] for folder in folders] or [0] * len(self.files)
        self._captions = None if caption_field is None else find_captions(listing, self.files, caption_field)
        self.has_captions = self._captions is not None

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        sizes = [self._listing.size(file) for file in self.files]
        pictures = [os.fsencode(f"{file}\0{size}\0") for file, size in zip(self.files, sizes, strict=True)]
        return sha256([*pictures, *(self._captions.facts() if self._captions and self.has_captions else [])])

    def id(self, index: int) -> str:
        return readable(self.files[index])

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            data = paths.read_bytes(self.path / self.files[index])
        except OSError as error:  # the disk's trouble, not the picture's: never skipped
            raise unreadable(error) from None
        return decode_rgb(data), self.labels[index]

    def captions(self, index: int) -> Sequence[str]:
        assert self._captions is not None
        return self._captions.of(self.files[index])


# --------------------------------------------------------------------------------------------- files


def readable(name: str) -> str:
    """A file's name as text that can be written and printed; bytes that are no UTF-8 become \\x escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def unreadable(error: OSError) -> DataError:
    if error.filename is None:  # a bucket's
        return DataError(f"a file cannot be read: {error}")
    return DataError(f"{readable(str(error.filename))} cannot be read: {error.strerror}")


def size_of(file: pathlib.Path) -> int:
    """Bytes of a file; DataError for one that is none: reading a pipe or a device may never end."""
    try:
        found = file.stat()
    except OSError as error:
        raise unreadable(error) from None
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{readable(str(file))} is a pipe or a device, or a link to one; expected a picture")
    return found.st_size


@dataclass(frozen=True)
class Listing:
    """What lies below a folder.

    sizes: of all files by name, for a folder in a bucket, where one list costs less than a question for each file.
    """

    path: pathlib.Path
    sizes: Mapping[str, int] | None = None

    def pictures(self) -> Iterable[str]:
        """Names of the pictures."""
        if self.sizes is None:
            return _pictures(self.path)
        return (name for name in self.sizes if _is_picture(name) and "/." not in f"/{name}")

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return os.path.isfile(self.path / name) if self.sizes is None else name in self.sizes

    def size(self, name: str) -> int:
        """Bytes of a file; raises DataError for what is none."""
        return size_of(self.path / name) if self.sizes is None else self.sizes[name]


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _pictures(path: pathlib.Path) -> Iterable[str]:
    def refuse(error: OSError) -> None:
        raise unreadable(error)

    for folder, subfolders, names in os.walk(path, onerror=refuse, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for link in (os.path.join(folder, name) for name in subfolders):
            if os.path.islink(link) and pathlib.Path(folder).resolve().is_relative_to(os.path.realpath(link)):
                raise DataError(f"{readable(link)} is a link to a folder that it lies in; expected none")
        for name in names:
            if not name.startswith(".") and _is_picture(name):
                yield os.path.relpath(os.path.join(folder, name), path).replace(os.sep, "/")


# ------------------------------------------------------------------------------------------ captions


@dataclass(frozen=True)
class TextFiles:
    """Captions in a .txt file beside each picture, one a line."""

    listing: Listing
    files: Sequence[str]

    def of(self, file: str) -> Sequence[str]:
        """The captions of a picture. Raises BadImageError where it has none."""
        beside = self.listing.path / _text_file(file)
        try:
            lines = paths.read_bytes(beside).decode("utf-8-sig").splitlines()
        except FileNotFoundError:
            raise BadImageError(f"it has no caption; expected {readable(beside.name)} beside it") from None
        except UnicodeDecodeError:
            raise BadImageError(f"its caption {readable(beside.name)} is no text that is UTF-8") from None
        except OSError as error:
            raise unreadable(error) from None
        return [line for line in lines if line.strip()] or lines[:1] or [""]

    def facts(self) -> Iterator[bytes]:
        """What the fingerprint of the source says of them."""
        for file in self.files:
            beside, sizes = _text_file(file), self.listing.sizes
            there = os.path.lexists(self.listing.path / beside) if sizes is None else beside in sizes
            yield str(self.listing.size(beside) if there else "none").encode()


@dataclass(frozen=True)
class Table:
    """Captions of metadata files, by picture."""

    captions: Mapping[str, tuple[str, ...]]

    def of(self, file: str) -> Sequence[str]:
        """The captions of a picture. Raises BadImageError where it has none."""
        if file not in self.captions:
            raise BadImageError("it has no caption; expected a row of the metadata file for it")
        return self.captions[file]

    def facts(self) -> Iterator[bytes]:
        """What the fingerprint of the source says of them."""
        yield repr(sorted(self.captions.items())).encode(errors="surrogateescape")


def find_captions(listing: Listing, files: Sequence[str], field: str) -> TextFiles | Table | None:
    """The captions of a folder's pictures; None where it has none.

    field: the metadata files' column of captions (empty: text, caption or captions), or `txt` for the files beside
    pictures. Raises DataError where a metadata file cannot be read, names a picture that is not there, or has no such
    column.
    """
    folders = sorted({os.path.dirname(file) for file in files} | {""})
    tables = [
        (folder, listing.path / folder / name)
        for folder in folders
        for name in METADATA_NAMES
        if listing.has(os.path.join(folder, name))
    ]
    captions: dict[str, tuple[str, ...]] = {}
    there = set(files)
    found = False
    for folder, table in tables if field != "txt" else []:
        for line, row in _rows(table):
            where = f"line {line} of {table}"
            column = next((name for name in ([field] if field else FIELDS) if name in row), None)
            if column is None:
                continue
            picture, found = _picture(row, folder, there, where), True
            captions[picture] = captions.get(picture, ()) + _texts(row[column], f"{column} in {where}")
    if found:
        return Table(captions)
    if field not in ("", "txt"):
        return None
    return TextFiles(listing, files) if any(listing.has(_text_file(file)) for file in files) else None


def _picture(row: Mapping[str, Any], folder: str, there: set[str], where: str) -> str:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} has file_name {name!r}; expected the name of a picture")
    picture = os.path.normpath(os.path.join(folder, name)).replace(os.sep, "/")
    if picture not in there:
        raise DataError(
            f"{where} has file_name {name[:200]!r}, which is not there; expected a picture in its folder"
        )
    return picture


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where} is {json.dumps(value)[:80]}; expected a caption or a list of them")
    return tuple(texts)


def _rows(table: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number of its last line, columns) of every row of a metadata file. Raises DataError."""
    if not paths.is_remote(table):
        size_of(table)  # no pipe
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                rows = csv.DictReader(file, strict=True)
                yield from ((rows.line_num, row) for row in rows)
                return
            for number, line in enumerate(file, 1):
                row = json.loads(line) if line.strip() else {}
                if not isinstance(row, dict):
                    raise DataError(f"line {number} of {table} is {line[:80]!r}; expected an object")
                if row:
                    yield number, row
    except (UnicodeDecodeError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{table} cannot be read ({error}); expected rows with file_name and captions, in UTF-8"
        ) from None
    except OSError as error:
        raise unreadable(error) from None


def _text_file(file: str) -> str:
    return os.path.splitext(file)[0] + ".txt"
