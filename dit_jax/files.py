"""Files that people name: checked before long work starts, visible when they are whole."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator

from dit_jax import signals
from dit_jax.config import ConfigError
from dit_jax.config.saved import shown

ROOM = 16 * 1024  # bytes that a folder must be able to take

# ------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A path to write to, which becomes `path` when the block ends and goes away when it fails.

    The folder is made. What `path` held before stays until then, also when the machine stops.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(target)
    signals.unfinished.add(os.fspath(beside))
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        signals.unfinished.discard(os.fspath(beside))
    sync_folder(target.parent)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A new folder to write into, which becomes `path` when the block ends and goes away when it fails."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(target)
    beside.mkdir()
    try:
        yield beside
        os.rename(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(target.parent)


def _beside(target: pathlib.Path) -> pathlib.Path:
    """A name that is unique among processes and hosts that share a disk."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a small file so that it is whole or not there at all."""
    with whole_file(path) as beside:
        beside.write_text(text)


def sync_folder(folder: pathlib.Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> pathlib.Path:
    """Where this package keeps what it can make again: dit_jax in $XDG_CACHE_HOME, or in ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dit_jax"


# ----------------------------------------------------------------------------------- checks up front


def check_folder(option: str, folder: str | os.PathLike[str]) -> None:
    """Make `folder`. Raises ConfigError, naming the option, where no file can be written in it."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(ROOM))
            probe.flush()
    except OSError as error:
        raise ConfigError(
            f"{option} is {shown(os.fspath(folder), 400)}, where no file can be written ({error.strerror}); "
            f"expected a folder with room"
        ) from None


def check_file(option: str, path: str | os.PathLike[str], size: int = ROOM) -> None:
    """Raises ConfigError, naming the option, where the file `path` of `size` bytes cannot be written."""
    target, name = pathlib.Path(path), shown(os.fspath(path), 400)
    if not target.name:
        raise ConfigError(f"{option} is {name}, which names no file; expected a file")
    if os.path.isdir(path):
        raise ConfigError(f"{option} is {name}, which is a folder; expected a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{option} is {name}, which is a device or a pipe; expected a file")
    check_folder(option, target.parent)
    try:  # names may be too long, for one
        probe = _beside(target)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{option} is {name}, which cannot be written ({error.strerror}); expected a file"
        ) from None
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise ConfigError(
            f"{option} is {name}, a file of {size / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB left; "
            "expected one with room"
        )
