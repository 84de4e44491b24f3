"""Where the files of an encoder lie: a folder, or the copy of a hub's repository."""

from __future__ import annotations

import atexit
import fnmatch
import functools
import hashlib
import pathlib
import tempfile
from collections.abc import Iterable

from dit_jax import paths, signals
from dit_jax.config import ConfigError
from dit_jax.interop.diffusers import from_hub, is_hub_id
from dit_jax.interop.tensor_files import weight_files

WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"  # what older repositories have in its place


def folder_of(place: str, patterns: list[str]) -> pathlib.Path:
    """The folder that a place is, or the copy of the hub's files of these names; ConfigError where there is none."""
    folder = paths.from_user(place)
    if paths.is_folder(folder):
        return _fetched(place, tuple(patterns)) if paths.is_remote(folder) else folder
    if not is_hub_id(place):
        raise ConfigError(f"the text encoder {place[:200]!r} is not there; expected a folder or a hub id")
    try:
        return from_hub(f"the text encoder {place}", place, patterns)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None


@functools.cache
def _fetched(place: str, patterns: tuple[str, ...]) -> pathlib.Path:
    """A copy of those files of a folder in a bucket, which stays on the disk as long as the process runs: libraries
    read a folder's files when they need them."""
    kept = tempfile.TemporaryDirectory(prefix="dit_jax-")
    atexit.register(kept.cleanup)
    signals.unfinished.add(kept.name)
    for name, file in paths.files_below(paths.to_path(place)).items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            here = pathlib.Path(kept.name) / name
            here.parent.mkdir(parents=True, exist_ok=True)
            paths.copy(file, here)
    return pathlib.Path(kept.name)


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
