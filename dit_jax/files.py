"""Files that people name: checked before long work starts, visible when they are whole."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator

from dit_jax import paths, signals
from dit_jax.config import ConfigError
from dit_jax.config.saved import shown

ROOM = 16 * 1024  # bytes that a folder must be able to take
NAME = 160  # letters that a name in it may have: a checkpoint's files lie some folders below a run's

# ------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def whole_file(path: paths.Named) -> Iterator[pathlib.Path]:
    """A path on the disk to write to, which becomes `path` when the block ends and goes away when it fails.

    The folder is made. What `path` held before stays until then, also when the machine stops.
    """
    target = paths.to_path(path)
    if paths.is_remote(target):
        with _uploaded(target) as here:
            yield here
        return
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
def whole_folder(path: paths.Named, last: str = "") -> Iterator[pathlib.Path]:
    """A new folder on the disk to write into, which becomes `path` when the block ends and goes away when it fails.

    In a bucket `last`, a name in the folder, appears after all else: by it others know that the folder is whole.
    """
    target = paths.to_path(path)
    if paths.is_remote(target):
        with _uploaded_folder(target, last) as here:
            yield here
        return
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


@contextlib.contextmanager
def _uploaded(target: pathlib.Path) -> Iterator[pathlib.Path]:
    with _staged() as folder:
        here = folder / target.name
        yield here
        paths.upload(here, target)


@contextlib.contextmanager
def _uploaded_folder(target: pathlib.Path, last: str) -> Iterator[pathlib.Path]:
    with _staged() as folder:
        yield folder
        files = sorted(paths.files_below(folder).items(), key=lambda found: found[0] == last)
        try:
            for name, file in files:
                paths.upload(file, target / name)
        except BaseException:
            paths.remove(target)
            raise


@contextlib.contextmanager
def _staged() -> Iterator[pathlib.Path]:
    """A folder on the disk for what is then put into a bucket."""
    with tempfile.TemporaryDirectory(prefix="dit_jax-") as folder:
        signals.unfinished.add(folder)
        try:
            yield pathlib.Path(folder)
        finally:
            signals.unfinished.discard(folder)


def _beside(target: pathlib.Path) -> pathlib.Path:
    """A name that is unique among processes and hosts that share a disk."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def write_whole(path: paths.Named, text: str) -> None:
    """Write a small file so that it is whole or not there at all."""
    with whole_file(path) as beside:
        beside.write_text(text)


def sync_folder(folder: pathlib.Path) -> None:
    """Make renames in a folder durable; in a bucket all is."""
    if paths.is_remote(folder):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> pathlib.Path:
    """Where this package keeps what it can make again: dit_jax in $XDG_CACHE_HOME, or in ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dit_jax"


# ----------------------------------------------------------------------------------- checks up front


def check_folder(option: str, folder: paths.Named) -> None:
    """Make `folder`. Raises ConfigError, naming the option, where no file can be written in it."""
    if paths.is_remote(paths.to_path(folder)):  # raises for other stores
        _check_bucket(option, paths.to_path(folder))
        return
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


def _check_bucket(option: str, folder: pathlib.Path) -> None:
    probe = folder / f".probe-{secrets.token_hex(NAME // 2)}"
    try:
        probe.write_bytes(b"")
        paths.remove(probe)
    except (OSError, ValueError) as error:
        problem = "no such bucket" if isinstance(error, FileNotFoundError) else error
        problem = getattr(error, "reason", "") or problem  # without the name of the probe
        raise ConfigError(
            f"{option} is {shown(str(folder), 400)}, where nothing can be written ({problem}); "
            "expected a folder of a bucket that is there and may be written"
        ) from None


def _check_object(option: str, file: pathlib.Path) -> None:
    name = shown(str(file), 400)
    if paths.is_folder(file) or file.parent == file:
        raise ConfigError(f"{option} is {name}, which is a folder; expected a file")
    if len(os.fsencode(file.name)) > 255:  # it is made on the disk
        raise ConfigError(f"{option} is {name}, which is too long; expected a name of at most 255 bytes")
    _check_bucket(option, file.parent)


def check_file(option: str, path: paths.Named, size: int = ROOM) -> None:
    """Raises ConfigError, naming the option, where the file `path` of `size` bytes cannot be written."""
    if paths.is_remote(path):
        _check_object(option, paths.to_path(path))
        return
    paths.to_path(path)  # raises for other stores
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
