"""Tables and pictures of the scaling study, drawn from its measurements.

A measurement is a line of a run's quality.jsonl: `step`, `distance` (Frechet, the lower the better), `macs` of a
forward pass on one latent, `parameters`, `training_macs` of a step. Runs of one network that differ in their seed
alone are shown as their mean.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Line = Mapping[str, Any]
MARKS = "osD^v<>"


@dataclass(frozen=True)
class Curve:
    """One network's measurements: arrays over steps, means over seeds; `low` and `high` are the seeds' extremes."""

    size: str
    patch_size: int
    conditioning: str
    seeds: int
    steps: np.ndarray
    distance: np.ndarray
    low: np.ndarray
    high: np.ndarray
    agreement: float | None
    macs: int
    parameters: int
    step_macs: int

    @property
    def name(self) -> str:
        """As in the paper: size/patch."""
        return f"{self.size}/{self.patch_size}"


def curves(found: Mapping[Any, Sequence[Line]]) -> list[Curve]:
    """Curves of a study's runs, in the order of their arithmetic; each over the steps that all its runs have."""
    networks: dict[tuple[str, int, str], list[Sequence[Line]]] = {}
    for member, lines in found.items():
        networks.setdefault((member.size, member.patch_size, member.conditioning), []).append(lines)
    made = []
    for key, runs in networks.items():
        count, one = min(map(len, runs)), runs[0][0]
        distance = np.array([[line["distance"] for line in lines[:count]] for lines in runs])
        last = [lines[count - 1].get("agreement") for lines in runs]
        made.append(
            Curve(
                *key, len(runs), np.array([line["step"] for line in runs[0][:count]]), distance.mean(axis=0),
                distance.min(axis=0), distance.max(axis=0), None if None in last else float(np.mean(last)),
                one["macs"], one["parameters"], one["training_macs"],
            )
        )  # fmt: skip
    return sorted(made, key=lambda curve: curve.macs)


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's, of the logarithms; nan for fewer than three different points."""
    if min(len(set(x)), len(set(y))) < 3:
        return float("nan")
    return float(np.corrcoef(np.log(x), np.log(y))[0, 1])


def table(found: Mapping[Any, Sequence[Line]]) -> str:
    """The measurements at the end of the runs as Markdown, what goes with quality, and who uses compute best."""
    all_curves = curves(found)
    rows = [
        "| network | MMACs | parameters | distance | seeds' range | read as asked |",
        "|---|---|---|---|---|---|",
    ]
    for c in all_curves:
        name = c.name if c.conditioning == "adaln_zero" else f"{c.name} {c.conditioning}"
        read = "-" if c.agreement is None else f"{c.agreement:.1%}"
        rows.append(
            f"| {name} | {c.macs / 1e6:.2f} | {c.parameters:,} | {c.distance[-1]:.1f} | "
            f"{c.low[-1]:.1f} to {c.high[-1]:.1f} | {read} |"
        )
    plain = [c for c in all_curves if c.conditioning == "adaln_zero"]
    last = [c.distance[-1] for c in plain]
    return "\n".join(
        [
            *rows, "",
            "correlation of the logarithm of the distance with that of",
            f"  MACs of a forward pass  {correlation([c.macs for c in plain], last):+.3f}",
            f"  parameters              {correlation([c.parameters for c in plain], last):+.3f}",
            "", *best_for_compute(plain),
        ]
    )  # fmt: skip


def best_for_compute(plain: Sequence[Curve], budgets: int = 8) -> list[str]:
    """For budgets of training compute, the least distance that was measured within it, and which network's."""
    points = [
        (int(step) * c.step_macs, float(distance), c.name, int(step))
        for c in plain
        for step, distance in zip(c.steps, c.distance, strict=True)
    ]
    least, most = min(points)[0], max(points)[0]
    lines = ["training compute (MACs), the best network within it, its distance and steps"]
    for budget in np.geomspace(least, most, budgets):
        _, distance, name, step = min((p for p in points if p[0] <= budget * 1.001), key=lambda p: p[1])
        lines.append(f"  {budget:8.2e}  {name:8} {distance:6.1f} {step:7}")
    return lines


def draw(found: Mapping[Any, Sequence[Line]], folder: pathlib.Path, title: str) -> None:
    """Write scaling.png, and conditioning.png where more than one way of conditioning was measured."""
    import matplotlib

    matplotlib.use("Agg")

    all_curves = curves(found)
    plain = [c for c in all_curves if c.conditioning == "adaln_zero"]
    if plain:
        _draw_scaling(plain, folder / "scaling.png", title)
    others = {(c.size, c.patch_size) for c in all_curves if c.conditioning != "adaln_zero"}
    compared = [c for c in all_curves if (c.size, c.patch_size) in others]
    if others:
        _draw_conditionings(compared, folder / "conditioning.png", title)


def _styles(plain: Sequence[Curve]) -> dict[str, dict[str, Any]]:
    """A colour for each size, a mark for each patch size."""
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(c.size for c in sorted(plain, key=lambda c: c.parameters)))
    patches = sorted({c.patch_size for c in plain}, reverse=True)
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, len(sizes)))
    return {
        c.name: {
            "color": colours[sizes.index(c.size)],
            "marker": MARKS[patches.index(c.patch_size) % len(MARKS)],
        }
        for c in plain
    }


def _draw_scaling(plain: Sequence[Curve], path: pathlib.Path, title: str) -> None:
    """Distance against steps, the arithmetic of a forward pass, parameters, and the arithmetic of training."""
    import matplotlib.pyplot as plt

    styles = _styles(plain)
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), sharey=True, layout="constrained")
    (steps, macs), (compute, parameters) = axes
    last = [c.distance[-1] for c in plain]
    for c in plain:
        style = styles[c.name] | {"markersize": 5}
        steps.plot(c.steps, c.distance, label=c.name, **style)
        compute.plot(c.step_macs * c.steps, c.distance, **style)
        macs.plot(c.macs, c.distance[-1], linestyle="", **style)
        parameters.plot(c.parameters, c.distance[-1], linestyle="", **style)
    steps.set(xlabel="training steps", ylabel="Frechet distance", title=title)
    steps.legend(ncols=3, fontsize=8, title="size/patch")
    compute.set(xlabel="MACs of the whole training", ylabel="Frechet distance", xscale="log")
    for axis, name, x in (
        (macs, "MACs of a forward pass", [c.macs for c in plain]),
        (parameters, "parameters", [c.parameters for c in plain]),
    ):
        axis.set(
            xlabel=name, xscale="log", title=f"correlation of the logarithms {correlation(x, last):+.2f}"
        )
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(labelleft=True, labelsize=8, which="both")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_conditionings(compared: Sequence[Curve], path: pathlib.Path, title: str) -> None:
    """Distance against steps of the ways of conditioning at one size; the band is between the seeds' extremes."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    for i, c in enumerate(compared):
        axis.plot(
            c.steps, c.distance, "o-", color=f"C{i}", label=f"{c.conditioning}, {c.macs / 1e6:.2f} MMACs"
        )
        axis.fill_between(c.steps, c.low, c.high, color=f"C{i}", alpha=0.15, linewidth=0)
    axis.set(
        xlabel="training steps", ylabel="Frechet distance", yscale="log", title=f"{title}, {compared[0].name}"
    )
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)
