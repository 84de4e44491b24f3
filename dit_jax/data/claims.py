"""Claims on the parts of a dataset: processes that would make the same part at once take turns.

A claim is a lock on one byte of a file in the dataset's folder. The system drops it when its process ends, however
that ends, so a killed process leaves no claim behind.
In a bucket all parts of a process are one lease: processes that share only some of them make those twice, alike.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import pathlib
import sys
from collections.abc import Iterable, Iterator

from dit_jax import leases, paths

RECIPE = 0  # what is claimed to write the recipe
FIRST_SHARD = 1  # shard i is part FIRST_SHARD + i

_HELD = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def claimed(file: pathlib.Path, parts: Iterable[int]) -> Iterator[bool]:
    """Hold these parts while the block runs, after waiting for the processes that hold any of them.

    Yields whether the parts are held: a file system without locks is left alone. A process must not nest blocks on
    one file, as the end of the inner one drops all of its locks. Raises OSError where the file cannot be written.
    """
    if paths.is_remote(file):
        first, *others = sorted(parts) or [0]
        name = f"{file.name}-{first}-{[first, *others][-1]}-{len(others)}"
        # Whoever takes over makes the same bytes, which appear whole: no harm is done.
        with leases.leased(file.with_name(name), lost=lambda said: None, wait=True):
            yield True
        return
    with file.open("a") as handle:
        held = True
        waited = False
        for part in sorted(parts):  # all in one order: no two processes wait for each other
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, part)
            except OSError as error:
                if error.errno not in _HELD:
                    held = False
                    break
                if not waited:
                    waited = True
                    print(f"waiting for another process in {file.parent.parent}", file=sys.stderr, flush=True)
                fcntl.lockf(handle, fcntl.LOCK_EX, 1, part)
        yield held
