"""DiT-XL/2 compiled for TPUs that are not here: memory, collectives and the compiler's estimate of the time.

    python benchmarks/compile_table.py --out runs/compile_table.json --docs docs/performance.md

Takes about a minute per row on two cores, and needs libtpu, no TPU. With --docs the table between the page's two
markers is replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from dataclasses import dataclass
from typing import Any

import harness
from tqdm import tqdm

from dit_jax.config import load, resolve
from dit_jax.generation.sampling import SamplingOptions
from dit_jax.planning.compile_for import compile_sampling, compile_training
from dit_jax.planning.report import DoesNotFitError, Report
from dit_jax.planning.topology import topology_devices

MARKERS = ("<!-- compile_table: begin -->", "<!-- compile_table: end -->")
RECIPES = pathlib.Path(__file__).parent.parent / "configs"
HEAD = """\
| | chips | images a chip | GiB of HBM a chip | sent a chip (overlapped) | estimated time | MFU, collectives hidden \
| MFU, exposed ones on top | images/s a chip | compiled in |
|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """What is compiled: a recipe's training step, or with `sampling` the whole loop of a batch."""

    recipe: str
    topology: str
    images: int
    sampling: SamplingOptions | None = None

    @property
    def name(self) -> str:
        size = self.recipe.removeprefix("dit_xl2_imagenet")
        if self.sampling is None:
            return f"XL/2-{size}, training step"
        return f"XL/2-{size}, {self.sampling.steps} {self.sampling.sampler.upper()} steps, guided"


# As many images as leave a third of the memory free or more; the second row is the paper's batch of 256.
ROWS = (
    Row("dit_xl2_imagenet256", "v5e:16x16", 32),
    Row("dit_xl2_imagenet256", "v5e:4x4", 16),
    Row("dit_xl2_imagenet256", "v4:4x4x8", 64),
    Row("dit_xl2_imagenet256", "v5p:4x4x8", 128),
    Row("dit_xl2_imagenet256", "v6e:16x16", 64),
    Row("dit_xl2_imagenet512", "v5e:16x16", 8),
    Row("dit_xl2_imagenet512", "v4:4x4x8", 16),
    Row("dit_xl2_imagenet512", "v5p:4x4x8", 32),
    Row("dit_xl2_imagenet512", "v6e:16x16", 16),
    Row("dit_xl2_imagenet256", "v5e:2x4", 16, SamplingOptions("ddim", 50, 1.5)),
)


def compile_row(row: Row) -> Report:
    """The row's report; DoesNotFitError where a chip has too little memory."""
    config = resolve(load(RECIPES / f"{row.recipe}.py"))
    chips = len(topology_devices(row.topology)[1])
    batch_size = row.images * chips
    if row.sampling is not None:
        return compile_sampling(config, row.sampling, batch_size, row.topology)
    train = dataclasses.replace(config.train, batch_size=batch_size)
    return compile_training(dataclasses.replace(config, train=train), row.topology)


def table_line(row: Row, report: Report) -> str:
    """The row of the markdown table."""
    sent = sum(c.wire_bytes for c in report.collectives)
    hidden = sum(c.wire_bytes - c.exposed_bytes for c in report.collectives)
    chips = 1
    for size in report.mesh.values():
        chips *= size
    time_text = f"{report.seconds:.2f} s" if report.seconds > 1 else f"{report.seconds * 1e3:.0f} ms"
    cells = (
        row.name,
        f"{chips} {report.chip.name}",
        f"{report.images_per_chip:g}",
        f"{report.total_bytes / 2**30:.1f} of {report.chip.hbm_gib:g}",
        f"{sent / 1e9:.2f} GB ({hidden / sent:.0%})",
        time_text,
        f"{report.mfu:.1%}",
        f"{report.mfu_with_collectives:.1%}",
        f"{report.images_per_chip / report.seconds:.1f}",
        f"{report.compile_seconds:.0f} s",
    )
    return "| " + " | ".join(cells) + " |\n"


def costs_table(report: dict[str, Any]) -> str:
    """The ten costliest operations of a report, as a markdown table."""
    lines = ["| share of the time | runs | first result | operation in the network |", "|---|---|---|---|"]
    for op in report["operations"]:
        shape = op["shape"].strip("(").partition("{")[0]
        lines.append(
            f"| {op['cycles'] / report['cycles']:.1%} | {op['times']} | `{shape}` | "
            f"{'backward' if 'transpose(' in op['source'] else 'forward'}, "
            f"`{op['source'].partition('blocks/')[2] or op['source']}` |"
        )
    return "\n".join(lines) + "\n"


def replace_table(page: pathlib.Path, table: str) -> None:
    """Put the table between the page's markers; SystemExit where it has none."""
    text = page.read_text()
    begin, found, rest = text.partition(MARKERS[0])
    _, found_end, after = rest.partition(MARKERS[1])
    if not found or not found_end:
        raise SystemExit(f"--docs is {page}, which lacks the lines {MARKERS[0]} and {MARKERS[1]}")
    page.write_text(f"{begin}{MARKERS[0]}\n{table}{MARKERS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file of the result")
    parser.add_argument("--only", default="", help="compile rows whose name holds this; others are --out's")
    parser.add_argument("--docs", type=pathlib.Path, help="page whose table is replaced")
    args = parser.parse_args()
    known = {row["key"]: row for row in json.loads(args.out.read_text())["rows"]} if args.only else {}
    if args.docs:
        replace_table(
            args.docs, args.docs.read_text().partition(MARKERS[0])[2].partition(MARKERS[1])[0].lstrip()
        )
    results: list[dict[str, Any]] = []
    for row in tqdm(ROWS, desc="compiling", unit="row"):
        key = f"{row.name} on {row.topology}"
        if args.only in key or key not in known:
            try:
                report = compile_row(row)
            except DoesNotFitError as error:
                raise SystemExit(f"{key}: {error}") from None
            known[key] = {"key": key, "line": table_line(row, report)} | report.to_dict()
            # Written after every row: what is compiled is not lost when the run is stopped.
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"rows": list(known.values())}))
        results.append(known[key])
    table = HEAD + "".join(row["line"] for row in results)
    table += f"\nThe ten costliest operations of the first row:\n\n{costs_table(results[0])}"
    if args.docs:
        replace_table(args.docs, table)
    print(table)
    harness.finish(args, {"rows": results})


if __name__ == "__main__":
    main()
