"""What a compiled TPU program says of itself: loops, collectives and the compiler's cycle estimates.

Read from the text of the optimized HLO (`compiled.as_text()`). Only computations that run as such count: the
entry and the bodies of loops, conditionals and calls, each as often as its loops run it. A fusion is one
operation; what lies inside it has no time of its own, but its collectives are real.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: `text` is all that follows the opening parenthesis of the operands."""

    name: str
    shape: str
    opcode: str
    text: str
    is_root: bool


@dataclass(frozen=True)
class Module:
    """Computations by name, and which of them is the entry."""

    computations: dict[str, list[Instruction]]
    entry: str


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind, on one device in one run of the program.

    Attributes: `count` executions, of which `asynchronous` overlap with computation; `bytes` their full arrays
    (the gathered, or the one to be reduced); `wire_bytes` what a device sends over a ring, at least, of which
    `exposed_bytes` by those that do not overlap.
    """

    kind: str
    count: int
    asynchronous: int
    bytes: int
    wire_bytes: float
    exposed_bytes: float


@dataclass(frozen=True)
class Operation:
    """An operation and its cycles in one run of the program, all of its `times` executions together."""

    name: str
    opcode: str
    shape: str
    source: str
    times: int
    cycles: int


def parse(text: str) -> Module:
    """The module of an HLO text; ValueError if it has no entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}"):
            found = _COMPUTATION.match(line)
            current = computations.setdefault(found[2], []) if found else None
            if found and found[1]:
                entry = found[2]
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(Instruction(match[2], match[3], match[4], match[5], bool(match[1])))
    if not entry:
        raise ValueError("the HLO text has no ENTRY computation")
    return Module(computations, entry)


def shape_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays, without the padding of its layout."""
    total = 0
    for kind, bits, sides in _ARRAY.findall(shape):
        width = 8 if kind == "pred" else int(bits)
        total += math.ceil(width * math.prod(int(n) for n in sides.split(",") if n) / 8)
    return total


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a while loop runs: as the compiler noted it, else the bound its condition compares with.

    1 where neither says it.
    """
    known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.text)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    lines = module.computations.get(condition[1], []) if condition else []
    root = next((i for i in lines if i.is_root and i.opcode == "compare"), None)
    if root and "direction=LT" in root.text:
        for line in lines:
            bound = re.match(r"(\d+)\)", line.text)
            if line.opcode == "constant" and bound and re.search(rf"%?{re.escape(line.name)}\b", root.text):
                return int(bound[1])
    return 1


def executions(module: Module) -> Counter[str]:
    """How often each computation runs as such, in one run of the program. Every branch counts as taken."""
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in module.computations.get(name, ()):
            if line.opcode == "while":
                repeat = count * trip_count(module, line)
            elif line.opcode in ("call", "conditional"):
                repeat = count
            else:
                continue
            for called in _called(line):
                visit(called, repeat)

    visit(module.entry, 1)
    return times


def operations(module: Module, flops_per_cycle: float) -> list[Operation]:
    """Operations with their cycles, the costliest first.

    Cycles are the compiler's estimate. A kernel (custom call) has none: it counts at the chip's peak for the
    FLOPs that it states, which is too little.
    """
    found = []
    for name, times in executions(module).items():
        for line in module.computations.get(name, ()):
            estimate = re.search(r'"estimated_cycles":"(\d+)"', line.text)
            flops = re.search(r'"cost_estimate":\{"flops":"(\d+)"', line.text)
            if estimate:
                cycles = int(estimate[1])
            elif line.opcode == "custom-call" and flops:
                cycles = round(int(flops[1]) / flops_per_cycle)
            else:
                continue
            source = re.search(r'op_name="([^"]*)"', line.text)
            op = Operation(
                line.name, line.opcode, line.shape, source[1] if source else "", times, times * cycles
            )
            found.append(op)
    return sorted(found, key=lambda o: -o.cycles)


def collectives(module: Module) -> list[Collective]:
    """Collectives by kind. One that the compiler spread over several fusions, to overlap it, counts once."""
    rows: dict[str, list[float]] = {}
    for name, times in executions(module).items():
        spread: set[tuple[str, str | None]] = set()
        for line, fusion in _with_fused(module, name):
            kind = line.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            overlaps = line.opcode.endswith("-start") or fusion == "async"
            if fusion == "async":
                channel = re.search(r"channel_id=(\d+)", line.text)
                key = (kind, channel[1] if channel else None)
                if key in spread:
                    continue
                spread.add(key)
            group = group_size(line.text)
            size = _whole_bytes(line, kind, group)
            if kind == "all-reduce" and fusion == "scatter":
                kind = "reduce-scatter"
            wire = size * (group - 1) / group * (2 if kind == "all-reduce" else 1)
            if kind == "collective-permute":
                wire = size
            row = rows.setdefault(kind, [0, 0, 0, 0, 0])
            for i, value in enumerate((1, int(overlaps), size, wire, 0 if overlaps else wire)):
                row[i] += times * value
    return [
        Collective(kind, int(row[0]), int(row[1]), int(row[2]), row[3], row[4])
        for kind, row in sorted(rows.items())
    ]


def group_size(text: str) -> int:
    """Devices that take part in a collective together, from its replica_groups."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(part.split("=") for part in match[1].split(","))
        return math.prod(int(sizes[axis.split(":")[0]]) for axis in match[2].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return match[1].count(",") + 1
    return 1


def _whole_bytes(line: Instruction, kind: str, group: int) -> int:
    size = shape_bytes(line.shape)
    if line.opcode == "all-gather-start":  # (operands, results)
        return size * group // (group + 1)
    if kind == "collective-permute" and line.opcode.endswith("-start"):  # (operand, result, context)
        return size // 2
    return size * group if kind == "reduce-scatter" else size


def _called(line: Instruction) -> list[str]:
    """Names of the computations that an instruction runs, without a loop's condition."""
    names = _CALLED.findall(line.text)
    for branches in _BRANCHES.findall(line.text):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


def _with_fused(module: Module, name: str, fusion: str = "") -> Iterator[tuple[Instruction, str]]:
    """The instructions of a computation and of its fusions, each with the kind of fusion it lies in.

    "async" where the compiler overlaps the collective with other work in several fusions, "scatter" where an
    all-reduce and the slice of its result are one reduce-scatter, "" elsewhere.
    """
    for line in module.computations.get(name, ()):
        yield line, fusion
        if line.opcode not in ("fusion", "async-start"):
            continue
        for called in _called(line):
            inside = module.computations.get(called, ())
            kind = "async" if line.opcode == "async-start" else fusion
            if called.startswith("all-reduce-scatter"):
                kind = "scatter"
            elif any("AsyncCollective" in i.text for i in inside) or any(
                i.opcode in COLLECTIVES for i in inside
            ):
                kind = "async"
            yield from _with_fused(module, called, kind)
