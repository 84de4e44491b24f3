"""What the compiler is told apart from its defaults, and where it keeps its programs.

Only the TPU's has options: figures in docs/performance.md.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform

import jax
from jax.sharding import Mesh

from dit_jax.files import cache_folder

# KiB of on-chip memory for the working set of one operation, by jax's device_kind. The rest holds whole arrays.
_SCOPED_VMEM_KIB = {"TPU v5 lite": 32768, "TPU v5": 49152, "TPU v5p": 49152}


def compiler_options(mesh: Mesh) -> dict[str, str | int | bool] | None:
    """`compiler_options` of `jax.jit` for the devices of `mesh`; None for the defaults."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return None
    # No collective matmul: under fsdp it cuts every product into as many slivers as devices share the parameters,
    # and sends those around in a loop. Whole parameters are gathered while the layer before still computes.
    options: dict[str, str | int | bool] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
    if device.device_kind == "TPU v5 lite":
        # Gradients are scattered while the layer before is computed. The compiler refuses to on other generations.
        options["xla_enable_async_reduce_scatter_fusion"] = True
        options["xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter"] = True
    if device.device_kind in _SCOPED_VMEM_KIB:
        options["xla_tpu_scoped_vmem_limit_kib"] = _SCOPED_VMEM_KIB[device.device_kind]
    return options


def keep_compiled_programs() -> None:
    """Keep compiled programs for the next process, in ~/.cache/dit_jax unless JAX_COMPILATION_CACHE_DIR says where.

    One folder per kind of processor: a program for a CPU uses what that one can do, and homes may be shared.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / _processor()))


def _processor() -> str:
    """A short name of this kind of processor."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        abilities = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        abilities = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(abilities.encode()).hexdigest()[:8]}"
