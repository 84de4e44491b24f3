"""Shards of webdataset and img2dataset: plain tar files whose members KEY.jpg, KEY.txt and KEY.json are a record.

Nothing is extracted: the members' places are found once, and a record is read from there.
"""

from __future__ import annotations

import json
import pathlib
import tarfile
from collections.abc import Sequence
from typing import Any

from PIL import Image

from dit_jax import paths
from dit_jax.data.folders import FIELDS, readable, size_of, unreadable
from dit_jax.data.metadata import DataError
from dit_jax.data.sources import EXTENSIONS, MAX_LABEL, BadImageError, decode_rgb, sha256

Place = tuple[int, int, int]
"""Number of the shard, and the first byte of a member and how many there are."""
LOOKED_AT = 1000  # records, for captions: where these have none the others are taken to have none
_BLOCK = 512
_LABEL = ".cls"


class TarSource:
    """The records of a tar file, of all *.tar in a folder, or of those that a pattern names, in their order.

    A member's key is its name up to the first dot after the last slash. Captions are KEY.txt, whole; where
    there is none, KEY.json's text, caption or captions (caption_field: another name of it; None: no captions are
    wanted). KEY.cls is a label, a number.
    """

    in_memory = False

    def __init__(self, path: pathlib.Path, caption_field: str | None = None):
        self.shards = _shards(path)
        self.name = f"tar:{readable(path.name)}"
        self._field = caption_field
        records = [record for number in range(len(self.shards)) for record in self._index(number)]
        self._records = [(key, parts) for key, parts in records if _picture(parts)]
        if not self._records:
            raise DataError(f"tar:{path} holds no pictures; expected members such as KEY.jpg with KEY.txt")
        self.label_names: tuple[str, ...] = ()
        self.has_captions = caption_field is not None and any(
            self._has_caption(parts) for _, parts in self._records[:LOOKED_AT]
        )
        self._labels = self._read_labels()
        self.num_classes = max(self._labels, default=-1) + 1

    def __len__(self) -> int:
        return len(self._records)

    def fingerprint(self) -> str:
        """Of names and places of all members, and of where captions stand."""
        members = (
            f"{key}\0{extension}\0{place[1:]}\0".encode(errors="surrogateescape")
            for key, parts in self._records
            for extension, place in sorted(parts.items())
        )
        return sha256([*members, f"captions {self._field}".encode() if self.has_captions else b""])

    def id(self, index: int) -> str:
        key, parts = self._records[index]
        return readable(f"{self.shards[next(iter(parts.values()))[0]].name}/{key}")

    def read(self, index: int) -> tuple[Image.Image, int]:
        parts = self._records[index][1]
        return decode_rgb(self._bytes(parts[_picture(parts)])), self._labels[index] if self._labels else 0

    def captions(self, index: int) -> Sequence[str]:
        parts = self._records[index][1]
        if not self._field and ".txt" in parts:
            try:
                return [self._bytes(parts[".txt"]).decode("utf-8-sig")]
            except UnicodeDecodeError:
                raise BadImageError("its caption is no text that is UTF-8") from None
        return self._json_captions(parts)

    # ----------------------------------------------------------------------------------------- members

    def _index(self, number: int) -> list[tuple[str, dict[str, Place]]]:
        """(key, places by extension) of a shard's records."""
        shard, found = self.shards[number], dict[str, dict[str, Place]]()
        size, end = size_of(shard), 0
        try:
            with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    if end > size:
                        break
                    folder, _, name = member.name.rpartition("/")
                    stem, dot, extension = name.partition(".")
                    if not member.isreg() or not stem:
                        continue
                    parts = found.setdefault(f"{folder}/{stem}" if folder else stem, {})
                    if (dot + extension).lower() in parts:
                        raise DataError(
                            f"{shard} has two members of the name {readable(member.name)}; expected one"
                        )
                    parts[(dot + extension).lower()] = (number, member.offset_data, member.size)
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{shard} cannot be read ({error}); expected a plain tar file, whole") from None
        except OSError as error:
            raise unreadable(error) from None
        if end + _BLOCK > size:  # a tar ends with blocks of zeros
            raise DataError(f"{shard} is cut: it ends in the middle of its members; expected it whole")
        return list(found.items())

    def _bytes(self, place: Place) -> bytes:
        number, first, size = place
        try:
            data = paths.read_range(self.shards[number], first, size)
        except OSError as error:
            raise unreadable(error) from None
        if len(data) != size:
            raise DataError(f"{self.shards[number]} has become shorter while it was read")
        return data

    def _read_labels(self) -> list[int]:
        """The label of each record, where every one has one."""
        if not all(_LABEL in parts for _, parts in self._records):
            return []
        texts = [self._bytes(parts[_LABEL]).strip() for _, parts in self._records]
        for index, text in enumerate(texts):
            if not text.isdigit() or len(text) > 10 or int(text) > MAX_LABEL:
                raise DataError(f"{self.id(index)}{_LABEL} is {text[:40]!r}; expected a class number")
        return [int(text) for text in texts]

    # ---------------------------------------------------------------------------------------- captions

    def _has_caption(self, parts: dict[str, Place]) -> bool:
        if not self._field and ".txt" in parts:
            return True
        try:
            return bool(self._json_captions(parts))
        except BadImageError:
            return False

    def _json_captions(self, parts: dict[str, Place]) -> Sequence[str]:
        if ".json" not in parts:
            raise BadImageError("it has no caption; expected a .txt or a .json beside it")
        try:
            found: Any = json.loads(self._bytes(parts[".json"]))
        except (ValueError, RecursionError):
            raise BadImageError("its .json cannot be read; expected an object in UTF-8") from None
        names = [self._field] if self._field else FIELDS
        values = [found[name] for name in names if name in found] if isinstance(found, dict) else []
        texts = values[0] if values and isinstance(values[0], list) else values[:1]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise BadImageError(f"it has no caption; expected {' or '.join(names)} in its .json")
        return texts


def _picture(parts: dict[str, Place]) -> str:
    """The extension of a record's picture; empty where it has none."""
    return next((extension for extension in sorted(parts) if extension in EXTENSIONS), "")


def _shards(path: pathlib.Path) -> list[pathlib.Path]:
    """The tar files of a path, a folder or a pattern. Raises DataError where there are none."""
    if paths.is_folder(path):
        found = [path / name for name in paths.names_in(path) if name.endswith(".tar")]
    elif paths.is_file(path):
        found = [path]
    else:
        found = paths.matching(path)
    found = [shard for shard in found if not paths.is_folder(shard)]
    if not found:
        raise DataError(
            f"tar:{path} names no tar file; expected one, a folder of *.tar, or a pattern in quotes"
        )
    return found
