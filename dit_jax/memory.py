"""How much memory a process may have, and how one that computes on the CPU keeps it.

XLA asks for the buffers of a step when the step starts and gives them back when it ends. glibc hands blocks of that
size straight back to the system, which has to fill them with zeros again, page by page, at the next step.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib
import sys

# mallopt's parameters, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the next step; whether it does.

    Only where no accelerator can be in use and malloc is glibc's. Call it before the import of NumPy or JAX: their
    threads would otherwise have arenas of their own, which cannot hold large blocks.
    """
    if not (sys.platform == "linux" and _only_cpu()):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    options = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
    return mallopt is not None and all(mallopt(name, value) for name, value in options)


def host_memory() -> int:
    """Bytes of memory that this process may have at most: the host's, or less where its control group has a limit."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([host, *_group_limits(pathlib.Path("/proc/self/cgroup"), pathlib.Path("/sys/fs/cgroup"))])


def device_memory() -> int | None:
    """Bytes of memory that each device of this process may have, where that is known.

    Devices of a CPU share the host's memory.
    """
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return host_memory() // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def _group_limits(groups: pathlib.Path, root: pathlib.Path) -> list[int]:
    """Limits, in bytes, of a process's control groups and of all around them, in version 1 and 2 of Linux's."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:  # another system than Linux
        return []
    limits = []
    for _, controllers, path in lines:
        if controllers not in ("", "memory"):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        # Inside of a container the path may be that of the host, of which only the top is to be seen.
        inner = top / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(top):
                break
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # no such file, or "max"
                continue
    return limits


def _only_cpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
