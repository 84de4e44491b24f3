"""Where the files of an encoder lie: a folder, or the copy of a hub's repository."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterable

from dit_jax.config import ConfigError
from dit_jax.interop.diffusers import from_hub, is_hub_id
from dit_jax.interop.tensor_files import weight_files

WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"  # what older repositories have in its place


def folder_of(place: str, patterns: list[str]) -> pathlib.Path:
    """The folder that a place is, or the copy of the hub's files of these names; ConfigError where there is none."""
    folder = pathlib.Path(place).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(place):
        raise ConfigError(f"the text encoder {place[:200]!r} is not there; expected a folder or a hub id")
    try:
        return from_hub(f"the text encoder {place}", place, patterns)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None


def weights_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a model's weights, one or several that an index names; none where there are none.

    Raises ConfigError where one of the several is missing.
    """
    return weight_files(folder, WEIGHTS) or weight_files(folder, PICKLED)


def digest(files: Iterable[pathlib.Path]) -> str:
    """SHA-256 of the contents of files, in this order."""
    sha = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            sha.update(hashlib.file_digest(opened, "sha256").digest())
    return sha.hexdigest()
