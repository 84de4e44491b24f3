"""Devices as a mesh, and on which of its axes each array is split.

One table names the axes of every parameter by the end of its path; a preset says which named axis is split
over which axis of the mesh. The optimizer's moments and the EMA lie under paths that end like their
parameter's, so the same table covers them. Everything else in the state is replicated.

Mesh axes: data (copies, each with its part of the batch), fsdp (splits parameters along the width and also
the batch), tensor (splits heads and the MLP's hidden width). Devices that a fast network joins are a slice: the
chips of a TPU slice, the GPUs of a node. data crosses from one to the next, fsdp and tensor stay inside.
Letters: L layers, D width, H heads, K width of a head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.config import ConfigError, MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# The end of a parameter's path -> a name per axis (None: never split). Vectors stay whole: they are small.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("(bias|scale)", ()),
    ("(down|up)", ()),  # of low-rank adaptation
    ("patch_embed/kernel", (None, "embed")),
    ("t_embed/fc1/kernel", (None, "embed")),
    ("t_embed/fc2/kernel", ("embed", None)),
    ("(y|bytes)_embed/embedding", (None, "embed")),
    ("bytes_embed/window/kernel", (None, "embed")),
    ("context_embed/kernel", (None, "embed")),
    ("pooled_embed/fc1/kernel", (None, "embed")),
    ("pooled_embed/fc2/kernel", ("embed", None)),
    (r"\w*blocks/attn2?/(context_)?qkv/kernel", (None, "embed", None, "heads", None)),  # (L, D, 3, H, K)
    ("cross_attn/q/kernel", (None, "embed", "heads", None)),  # (L, D, H, K)
    ("cross_attn/kv/kernel", (None, "embed", None, "heads", None)),  # (L, D, 2, H, K)
    (
        r"(cross_)?attn2?/(context_)?proj/kernel",
        (None, "heads", None, "embed"),
    ),  # (L, H, K, D), of all attentions
    ("(context_)?mlp/fc1/kernel", (None, "embed", "mlp")),  # (L, D, 4D)
    ("(context_)?mlp/fc2/kernel", (None, "mlp", "embed")),  # (L, 4D, D)
    ("final_adaln/kernel", ("condition", None, "modulation")),  # (D, 2, D)
    (r"(\w+_)?adaln/kernel", ("condition", None, None, "modulation")),  # (D, L, 2, 4, 6 or 9, D)
    ("final_linear/kernel", ("embed", None)),
)

Rules = Mapping[str, tuple[str, ...]]

# Preset -> (rules for the parameters, rules for optimizer state and EMA).
_FSDP: Rules = {"embed": ("fsdp",), "modulation": ("fsdp",)}
_TENSOR: Rules = {
    "embed": ("fsdp",), "condition": ("fsdp",),
    "heads": ("tensor",), "mlp": ("tensor",), "modulation": ("tensor",),
}  # fmt: skip
_ZERO1: Rules = dict.fromkeys(("embed", "condition", "mlp", "modulation", "heads"), ("fsdp", "data"))
PRESETS: dict[str, tuple[Rules, Rules]] = {
    "replicated": ({}, {}),
    "zero1": ({}, _ZERO1),
    "fsdp": (_FSDP, _FSDP),
    "fsdp_tensor": (_TENSOR, _TENSOR),
}


def slices(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices, apart by the fast network that joins them, in an order that is the same in every process.

    JAX numbers the slices of TPUs, and GPUs by their host, also where each process has only one of them.
    """
    found: dict[int, list[Any]] = {}
    for device in devices:
        known = device.platform in ("tpu", "gpu")
        found.setdefault(getattr(device, "slice_index", 0) if known else 0, []).append(device)
    return [found[number] for number in sorted(found)]


def mesh_shape(config: MeshConfig, num_devices: int, per_slice: int = 0) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor) on that many devices: the preset's, where the config states none.

    per_slice: devices that a fast network joins (0: all). Raises ConfigError when the preset leaves an axis
    unused or the product is not the number of devices.
    """
    unused = {"replicated": ("fsdp", "tensor"), "zero1": ("tensor",), "fsdp": ("tensor",)}
    for axis in unused.get(config.preset, ()):
        if getattr(config, axis) not in (None, 1):
            raise ConfigError(
                f"--mesh.{axis} is {getattr(config, axis)}; expected 1, "
                f"because --mesh.preset {config.preset} splits nothing over it"
            )
    tensor = config.tensor if config.tensor is not None else (2 if config.preset == "fsdp_tensor" else 1)
    fsdp, data, local = config.fsdp, config.data, per_slice or num_devices
    if fsdp is None and (config.preset == "replicated" or -1 in (data, tensor)):
        fsdp = 1
    elif fsdp is None and data is not None:
        fsdp = -1
    elif fsdp is None and config.preset == "zero1":
        # Every published width is a multiple of 128; what is left of the devices may fit another axis.
        fsdp = math.gcd(local, 128)
        fsdp = 1 if fsdp == num_devices else fsdp
    elif fsdp is None:
        # Up to 16 devices share the parameters: that leaves little of the state on each, and gathers stay local.
        fsdp = math.gcd(max(local // tensor, 1), 16)
    if data is None:
        data = 1 if -1 in (fsdp, tensor) else -1
    sizes = (data, fsdp, tensor)
    known = math.prod(s for s in sizes if s != -1)
    filled = tuple(num_devices // known if s == -1 else s for s in sizes)
    if math.prod(filled) != num_devices:
        meant = " x ".join(
            f"{axis} {'(the rest)' if size == -1 else size}"
            for axis, size in zip(MESH_AXES, sizes, strict=True)
        )
        raise ConfigError(
            f"{asked(config)} means {meant}; expected a product equal to the {num_devices} devices"
        )
    return filled[0], filled[1], filled[2]


def asked(config: MeshConfig) -> str:
    """The options of the command line that say what `config` says."""
    sizes = ((axis, getattr(config, axis)) for axis in MESH_AXES)
    given = (f" --mesh.{axis} {size}" for axis, size in sizes if size is not None)
    return f"--mesh.preset {config.preset}" + "".join(given)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over `devices` (default: all devices of all processes).

    Raises ConfigError as `mesh_shape` does, and when fsdp x tensor does not fit into a slice of TPUs. Between the
    GPUs of several nodes both may be split, if asked for.
    """
    devices = jax.devices() if devices is None else devices
    groups = slices(devices)
    per_slice = math.gcd(*(len(group) for group in groups))
    data, fsdp, tensor = shape = mesh_shape(config, len(devices), per_slice)
    # A mesh axis may take a part of a physical one: 16 of v6e's 4x8 chips, for example.
    if len(groups) == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif len(groups) * per_slice == len(devices) and per_slice % (fsdp * tensor) == 0:
        inside = (data // len(groups), fsdp, tensor)
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (len(groups), 1, 1), devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":
        sizes = " and ".join(str(size) for size in sorted({len(group) for group in groups}))
        raise ConfigError(
            f"{asked(config)} means fsdp {fsdp} x tensor {tensor} inside a slice of TPUs; expected a divisor of "
            f"the devices of each of the {len(groups)} slices ({sizes})"
        )
    else:
        grid = np.array([device for group in groups for device in group]).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(batch_size: int, microbatch: int, mesh: Mesh) -> int:
    """The number of microbatches a step accumulates over; ConfigError when the batch does not divide."""
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % devices:
        raise ConfigError(
            f"--train.batch-size is {batch_size}; expected a multiple of the {devices} devices that split "
            f"the batch (data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']})"
        )
    per_device = batch_size // devices
    if microbatch == 0:
        return 1
    if per_device % microbatch:
        raise ConfigError(
            f"--train.microbatch is {microbatch}; expected a divisor of the {per_device} images that each of "
            f"the {devices} devices has of --train.batch-size {batch_size}"
        )
    return per_device // microbatch


def partition_spec(
    path: str,
    shape: Sequence[int],
    rules: Rules,
    mesh: Mesh,
    table: Sequence[tuple[str, tuple[str | None, ...]]] = PARAMETER_AXES,
    where_it_fits: bool = False,
) -> PartitionSpec:
    """Which mesh axes split the parameter at `path` (names joined by "/"); an axis of size 1 splits nothing.

    Raises ConfigError, naming parameter and axis, when the table has no row for it, and, unless `where_it_fits`,
    when two of its axes fall on one mesh axis or a size does not divide.
    """
    logical = next((axes for end, axes in table if re.search(f"(^|/){end}$", path)), None)
    if logical is None:
        raise ConfigError(f"parameter {path} has no row in the sharding table; expected one per parameter")
    if logical and len(logical) != len(shape):
        raise ConfigError(
            f"parameter {path} has shape {tuple(shape)}; the sharding table names axes {logical}"
        )
    if where_it_fits:
        return _widest_spec(shape, logical, rules, mesh)
    spec: list[tuple[str, ...] | None] = []
    taken: dict[str, int] = {}
    for position, name in enumerate(logical):
        axes = tuple(a for a in rules.get(name, ()) if mesh.shape[a] > 1) if name else ()
        for axis in axes:
            if axis in taken:
                raise ConfigError(
                    f"parameter {path}, shape {tuple(shape)}: axes {taken[axis]} and {position} ({name}) "
                    f"are both split over mesh axis {axis}"
                )
            taken[axis] = position
        parts = math.prod(mesh.shape[a] for a in axes)
        if shape[position] % parts:
            raise ConfigError(
                f"parameter {path}, shape {tuple(shape)}: axis {position} ({name}, size {shape[position]}) "
                f"is not divisible by mesh axis {' x '.join(axes)} of size {parts}; expected a divisor of it as "
                + " x ".join(f"--mesh.{a}" for a in axes)
            )
        spec.append(axes or None)
    return _without_end(spec)


def _widest_spec(
    shape: Sequence[int], logical: Sequence[str | None], rules: Rules, mesh: Mesh
) -> PartitionSpec:
    """Each mesh axis splits the first axis that it divides, in the order of `rules`, if there is one."""
    spec: list[tuple[str, ...]] = [()] * len(logical)
    left, taken = list(shape), set[str]()
    for name, axes in rules.items():
        for position in (p for p, other in enumerate(logical) if other == name):
            for axis in (a for a in axes if mesh.shape[a] > 1 and a not in taken):
                if left[position] % mesh.shape[axis] == 0:
                    left[position] //= mesh.shape[axis]
                    taken.add(axis)
                    spec[position] += (axis,)
    return _without_end([tuple(a for a in MESH_AXES if a in axes) or None for axes in spec])


def _without_end(spec: list[tuple[str, ...] | None]) -> PartitionSpec:
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def state_shardings(state: Any, mesh: Mesh, preset: str) -> Any:
    """A NamedSharding for every leaf of a TrainState (of arrays or of their shapes), in the same tree.

    Under zero1 a leaf that the devices do not divide is split over fewer, or stays whole; elsewhere that is a
    ConfigError.
    """
    params_rules, other_rules = PRESETS[preset]

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        field = name.partition("/")[0]
        if field not in ("params", "opt_state", "ema") or leaf.ndim == 0:
            return replicated(mesh)
        rules = params_rules if field == "params" else other_rules
        spec = partition_spec(name, leaf.shape, rules, mesh, where_it_fits=preset == "zero1")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def fsdp_axis(mesh: Mesh, preset: str) -> str | None:
    """See `Compute.fsdp_axis`."""
    return "fsdp" if PRESETS[preset][0] is _FSDP and mesh.shape["fsdp"] > 1 else None


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that one device holds of a tree of arrays or shapes under these shardings."""

    def size(leaf: Any, sharding: NamedSharding) -> int:
        return int(np.prod(sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))
