"""Copies of shards on a host's own disk, or in its memory, up to a limit.

A shard that is read first is copied whole; the one unused for longest leaves where there is no room. All processes
and threads of a host share a folder: a shard is copied once, and is there whole or not at all. They agree by locks
on files, which the system drops when a process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dit_jax import paths
from dit_jax.config import ConfigError, DataConfig
from dit_jax.files import cache_folder, check_folder

Fetch = Callable[[pathlib.Path, pathlib.Path], object]

LOCKS = ".locks"
ROOM = "room"  # the lock of who makes room
_SHARD = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"([0-9a-f]{64})-(\d+)\.part")  # of a shard of so many bytes


def fetch(shard: pathlib.Path, to: pathlib.Path) -> None:
    """Copy a shard to a file on this host."""
    paths.copy(shard, to)


@dataclass(frozen=True)
class ShardCache:
    """Shards by their checksum in a folder of this host, `limit` bytes of them at most."""

    folder: pathlib.Path
    limit: int
    fetch: Fetch = fetch

    @contextlib.contextmanager
    def held(self, shard: pathlib.Path, size: int, sha256: str) -> Iterator[pathlib.Path]:
        """A shard's copy, which does not leave while the block runs; who has opened it may read on after that.

        Raises OSError where it cannot be copied, and ValueError where what came has another size or checksum.
        """
        if size > self.limit:
            raise ValueError(f"its {size} bytes are more than the local cache holds, {self.limit}")
        local = self.folder / sha256
        while True:
            with self._lock(sha256, fcntl.LOCK_SH):
                if local.is_file() and local.stat().st_size == size:
                    os.utime(local, ns=(time.time_ns(),) * 2)  # the system's own clock ticks in 4 ms
                    yield local
                    return
            busy = None
            with self._lock(sha256, fcntl.LOCK_EX):
                if not (local.is_file() and local.stat().st_size == size):
                    busy = self._copy(shard, local, size)
            if busy is not None:  # who waits holds nothing: no two can wait for each other
                with self._lock(busy, fcntl.LOCK_EX):
                    pass

    def _copy(self, shard: pathlib.Path, local: pathlib.Path, size: int) -> str | None:
        """Copy a shard whose lock is held, or name one in use that has to be waited for."""
        if (busy := self._make_room(local.name, size)) is not None:
            return busy
        partial = self._partial(local.name, size)
        try:
            self.fetch(shard, partial)
            with partial.open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    raise ValueError(f"its copy has {found} bytes; metadata.json says {size}")
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            if checksum != local.name:
                raise ValueError(f"its copy has SHA-256 {checksum}; metadata.json says {local.name}")
            with self._lock(ROOM, fcntl.LOCK_EX):  # who lists the folder sees one of the two names
                os.replace(partial, local)
            return None
        finally:
            partial.unlink(missing_ok=True)

    def trim(self) -> None:
        """Let leave what is beyond the limit, of a folder that had a higher one."""
        self._make_room("", 0)

    def _make_room(self, key: str, size: int) -> str | None:
        """Make room for a shard whose lock is held, or name one that stands in the way and is in use now."""
        with self._lock(ROOM, fcntl.LOCK_EX):
            busy = None
            used, shards = size, []
            for entry in os.scandir(self.folder):
                if partial := _PARTIAL.fullmatch(entry.name):
                    if self._unless_held(key, partial[1], pathlib.Path(entry.path)):
                        continue  # of a process that was killed
                    busy = partial[1]
                    used += int(partial[2])
                elif _SHARD.fullmatch(entry.name):
                    found = entry.stat()
                    used += found.st_size
                    shards.append((found.st_mtime_ns, entry.name, found.st_size))
            for _, name, bytes_of in sorted(shards):
                if used <= self.limit:
                    break
                if self._unless_held(key, name, self.folder / name):
                    used -= bytes_of
                else:
                    busy = busy or name
            if used > self.limit:
                return busy
            if key:
                self._partial(key, size).touch()
            return None

    def _unless_held(self, key: str, other: str, file: pathlib.Path) -> bool:
        """Remove a file of the shard `other` unless it is in use; whether it went. The lock of `key` is held."""
        if _lock_of(other) == _lock_of(key):
            file.unlink(missing_ok=True)
            return True
        try:
            with self._lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB):
                file.unlink(missing_ok=True)
                return True
        except BlockingIOError:
            return False

    def _partial(self, key: str, size: int) -> pathlib.Path:
        return self.folder / f"{key}-{size}.part"

    @contextlib.contextmanager
    def _lock(self, name: str, how: int) -> Iterator[None]:
        """Hold a lock while the block runs. Each time the file is opened anew, so that threads exclude each other."""
        locks = self.folder / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / _lock_of(name)).open("a") as file:
            fcntl.flock(file, how)
            yield


def _lock_of(name: str) -> str:
    """The file whose lock is a shard's; a few shards may have the same one."""
    return name if name == ROOM else name[:3]


def needs_cache(directory: pathlib.Path) -> bool:
    """Whether shards there can only be read when they are copied: ArrayRecord reads disks and Google's buckets."""
    return str(directory).startswith("s3://")


def cache_of_bucket(directory: pathlib.Path) -> ShardCache:
    """A cache for a bucket that needs one, where the options ask for none: up to half of the disk's free room."""
    folder = cache_folder() / "shards"
    check_folder("--data.local-cache", folder)
    cache = ShardCache(folder, shutil.disk_usage(folder).free // 2)
    room = f"{cache.limit / 1e9:.0f} GB of them at most (--data.local-cache chooses)"
    print(f"shards of {directory} are copied to {folder}, {room}", file=sys.stderr, flush=True)
    return cache


def open_cache(data: DataConfig) -> ShardCache | None:
    """The cache that the options ask for. Raises ConfigError where its folder or its disk does not serve."""
    if not data.local_cache:
        return None
    if paths.is_remote(data.local_cache):
        raise ConfigError(f"--data.local-cache is {data.local_cache}; expected a folder of this host")
    folder, limit = pathlib.Path(data.local_cache), int(data.local_cache_gb * 1e9)
    check_folder("--data.local-cache", folder)
    held = sum(entry.stat().st_size for entry in os.scandir(folder) if _SHARD.fullmatch(entry.name))
    room = shutil.disk_usage(folder).free + held
    if room < limit:
        raise ConfigError(
            f"--data.local-cache-gb is {data.local_cache_gb:g}, but {folder} has room for {room / 1e9:.3g}; "
            "expected no more than that"
        )
    cache = ShardCache(folder, limit)
    cache.trim()
    return cache
