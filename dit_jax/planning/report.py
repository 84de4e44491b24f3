"""What a compiled program needs and costs, as figures and as text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dit_jax.planning import hlo, timeline
from dit_jax.planning.crossing import Crossing
from dit_jax.planning.topology import Chip
from dit_jax.training.launch import EXIT_DOES_NOT_FIT


class DoesNotFitError(RuntimeError):
    """The program needs more memory than a chip has."""


@dataclass(frozen=True)
class Report:
    """What a compiled program needs and costs, per chip; sizes in bytes, times in seconds.

    Attributes:
      arguments: bytes by part of what the program is given.
      memory: the compiler's account: arguments with the padding of their layout, outputs that share no
        argument's buffer, temporaries (activations, gradients, gathered parameters), code.
      images: that a chip computes, alone or, where the mesh has a tensor axis, with the others along it.
      flops: analytic, of one chip's part of the batch (forward, and backward when training).
      cycles, seconds: the compiler's estimate without collectives; `exposed_seconds` of collectives come on top.
      slices, crossings: of the topology, and what goes between them, which is in no time but `crossing_seconds`.
      unknown_loops: loops that nobody knows how often run; they count once, and times are lower bounds then.
    """

    what: str
    topology: str
    chip: Chip
    mesh: dict[str, int]
    images: int
    arguments: dict[str, int]
    memory: dict[str, int]
    collectives: list[timeline.Collective]
    flops: float
    cycles: int
    operations: list[hlo.Operation]
    compile_seconds: float
    unknown_loops: list[str]
    slices: int = 1
    crossings: list[Crossing] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Memory that one chip needs."""
        return sum(self.memory.values())

    @property
    def images_per_chip(self) -> float:
        """A chip's share of the batch; no whole number where several chips share an image."""
        return self.images / self.mesh.get("tensor", 1)

    @property
    def seconds(self) -> float:
        """Estimated time of computation."""
        return self.cycles / self.chip.clock

    @property
    def exposed_seconds(self) -> float:
        """Time that a chip waits for collectives."""
        return sum(c.exposed_bytes for c in self.collectives) / self.chip.ici

    @property
    def crossing_seconds(self) -> float:
        """Time that a chip's bytes for other slices take, one after the other."""
        return sum(c.wire_bytes for c in self.crossings) / self.chip.dcn

    @property
    def mfu(self) -> float:
        """Share of the chip's peak, if all collectives were hidden."""
        return self.flops / (self.seconds * self.chip.peak_flops)

    @property
    def mfu_with_collectives(self) -> float:
        """Share of the chip's peak with the exposed collectives on top."""
        return self.flops / ((self.seconds + self.exposed_seconds) * self.chip.peak_flops)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, the derived figures, the ten costliest operations."""
        found = asdict(replace(self, operations=self.operations[:10]))
        derived = (
            "total_bytes",
            "images_per_chip",
            "seconds",
            "exposed_seconds",
            "crossing_seconds",
            "mfu",
            "mfu_with_collectives",
        )
        return found | {name: getattr(self, name) for name in derived}


def print_report(script: str, compile_program: Callable[[], Report]) -> int:
    """Print the report, or why the program does not fit; the exit code of `script`."""
    try:
        print(describe(compile_program()))
    except DoesNotFitError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return EXIT_DOES_NOT_FIT
    return 0


def describe(report: Report, top: int = 12) -> str:
    """The report as lines of text."""
    chip, gib = report.chip, 2**30
    chips, tensor = int(np.prod(list(report.mesh.values()))), report.mesh.get("tensor", 1)
    lines = [
        f"program         {report.what}",
        f"chips           {chips} x {chip.name} ("
        + (f"{report.slices} slices of " if report.slices > 1 else "")
        + f"{report.topology}), mesh "
        + ", ".join(f"{axis} {size}" for axis, size in report.mesh.items()),
        f"batch           {report.images_per_chip:g} images per chip"
        + (f": {tensor} chips share {report.images}" if tensor > 1 else ""),
        f"compile time    {report.compile_seconds:.0f} s",
        f"memory          {report.total_bytes / gib:.2f} GiB of {chip.hbm_gib:g} GiB per chip: "
        + ", ".join(f"{name} {size / gib:.2f}" for name, size in report.memory.items()),
        *(f"                {size / gib:8.3f} GiB {name}" for name, size in report.arguments.items()),
        "collectives     count (with computation meanwhile), whole arrays, sent by a chip over a ring, waited for",
        *(
            f"                {c.kind:<19}{c.count:>5} ({c.asynchronous}) {c.bytes / 1e6:>10.1f} MB"
            f"{c.wire_bytes / 1e6:>10.1f} MB{c.exposed_bytes / 1e6:>10.1f} MB"
            for c in report.collectives
        ),
        *_between_slices(report),
        f"FLOPs           {report.flops / 1e12:.2f} T per chip, at {chip.peak_flops / 1e12:.0f} TFLOP/s peak",
        f"estimate        {report.cycles / 1e6:.1f} M cycles at {chip.clock / 1e9:.2f} GHz = "
        f"{report.seconds * 1e3:.1f} ms: {report.mfu:.1%} of the peak, "
        f"{report.images_per_chip / report.seconds:.1f} images/s per chip, with all collectives hidden",
        f"                {report.exposed_seconds * 1e3:.1f} ms of waiting for collectives (one axis of the "
        f"torus, {chip.ici / 1e9:.0f} GB/s) on top: {report.mfu_with_collectives:.1%}",
        *(
            [f"lower bound     of all times: loops that run an unknown number of times count once: {loops}"]
            if (loops := ", ".join(report.unknown_loops))
            else []
        ),
        f"operations      the {top} costliest of {len(report.operations)}",
    ]
    for op in report.operations[:top]:
        source = "/".join(op.source.split("/")[-3:]) or op.opcode
        share, shape = op.cycles / report.cycles, op.shape.partition("{")[0]
        lines.append(f"{share:>22.1%}  {op.times:>4} x {op.name:<34.34} {shape:<28.28} {source:.60}")
    return "\n".join(lines)


def _between_slices(report: Report) -> list[str]:
    if report.slices == 1:
        return []
    return [
        "between slices  count, arrays, sent by a chip over a ring",
        *(
            f"                {c.kind:<19}{c.count:>5} {c.bytes / 1e6:>15.1f} MB{c.wire_bytes / 1e6:>10.1f} MB"
            for c in report.crossings
        ),
        f"                {report.crossing_seconds * 1e3:.1f} ms at {report.chip.dcn / 1e9:g} GB/s a chip; "
        "the estimate below leaves them out",
    ]
