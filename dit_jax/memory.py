"""How a process that computes on the CPU keeps its memory.

XLA asks for the buffers of a step when the step starts and gives them back when it ends. glibc hands blocks of that
size straight back to the system, which has to fill them with zeros again, page by page, at the next step.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
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


def _only_cpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
