"""What a program sends from one slice of devices to another, over the slow network between them.

The TPU compiler adds inside a slice first and hands what is left to its multi-slice runtime, by a `send`. Other
compilers leave a collective whose replica groups span slices.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dit_jax.planning.hlo import COLLECTIVES, Instruction, Module, executions, shape_bytes
from dit_jax.planning.timeline import device_groups, transfer

_RUNTIME = '_xla_host_transfer_handler_name="xla_megascale_runtime"'


@dataclass(frozen=True)
class Crossing:
    """Collectives of one kind between slices, on one device in one run of the program.

    Attributes: `count` executions; `bytes` their arrays; `wire_bytes` what a device sends of them over a ring.
    """

    kind: str
    count: int
    bytes: int
    wire_bytes: float


def crossings(module: Module, slice_of: Sequence[int]) -> list[Crossing]:
    """Collectives that span slices, by kind. slice_of: the slice of each device, in the order of the mesh."""
    found: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for name, times in executions(module).items():
        for line in module.computations.get(name, ()):
            if crossing := _crossing(line, slice_of):
                for column, value in enumerate((1, crossing.bytes, crossing.wire_bytes)):
                    found[crossing.kind][column] += times * value
    return [Crossing(kind, int(n), int(size), wire) for kind, (n, size, wire) in sorted(found.items())]


def _crossing(line: Instruction, slice_of: Sequence[int]) -> Crossing | None:
    """What one line sends, None where it stays inside a slice."""
    if line.opcode == "send" and _RUNTIME in line.text:
        return _of_runtime(line, len(set(slice_of)))
    if line.opcode.removesuffix("-start") not in COLLECTIVES or "replica_groups=" not in line.text:
        return None
    groups = device_groups(line.text, len(slice_of))
    if all(len({slice_of[device] for device in group}) == 1 for group in groups):
        return None
    sent = transfer(line, "", len(slice_of))
    return Crossing(sent.kind, 1, sent.bytes, sent.wire_bytes)


def _of_runtime(line: Instruction, slices: int) -> Crossing:
    """A `send` of an array to the runtime, which is done with the other slices' arrays."""
    said = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.text)
    kind = said[1].lower().replace("_", "-") if said else "send"
    size = shape_bytes(line.shape.partition("]")[0] + "]")
    sent = {
        "all-reduce": 2 * (slices - 1) / slices,
        "all-gather": slices - 1,
        "reduce-scatter": (slices - 1) / slices,
    }
    return Crossing(kind, 1, size, size * sent.get(kind, 1))
