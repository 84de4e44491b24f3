"""Files that people name: checked before long work starts, visible when they are whole."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import tempfile
from collections.abc import Iterator

from dit_jax.config import ConfigError

ROOM = 16 * 1024  # bytes that a folder must be able to take

# ------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A path to write to, which becomes `path` when the block ends and goes away when it fails.

    The folder is made. What `path` held before stays until then, also when the machine stops.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Unique among processes and hosts that share a disk.
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


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
            f"{option} is {os.fspath(folder)!r}, where no file can be written ({error}); "
            f"expected a folder with room"
        ) from None


def check_file(option: str, path: str | os.PathLike[str]) -> None:
    """Raises ConfigError, naming the option, where the file `path` cannot be written."""
    if os.path.isdir(path):
        raise ConfigError(f"{option} is {os.fspath(path)!r}, which is a folder; expected a file")
    check_folder(option, pathlib.Path(path).parent)
