"""Quality against guidance, as a picture."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

from dit_jax.config import ConfigError
from dit_jax.evaluation.metrics import Evaluation
from dit_jax.files import whole_file

_SHARES = {"precision": "precision", "recall": "recall", "agreement": "read as the class asked for"}


def check_plot() -> None:
    """Raises ConfigError where curves cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--cfg-scale has several values, whose curve needs matplotlib; expected it to be installed"
        )


def plot_guidance(
    path: str | os.PathLike[str], scales: Sequence[float], results: Sequence[Evaluation]
) -> None:
    """Write a PNG with the Frechet distance of each scale, and beside it the shares that were measured."""
    from matplotlib.figure import Figure  # without pyplot: no window system is asked for

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    distance, shares = figure.subplots(1, 2)
    distance.plot(scales, [result.metrics["fid"] for result in results], "o-", color="tab:blue")
    distance.set_ylabel(f"Frechet distance ({results[0].features} features)")
    for metric, name in _SHARES.items():
        if all(metric in result.metrics for result in results):
            shares.plot(scales, [result.metrics[metric] for result in results], "o-", label=name)
    shares.set_ylabel("share of samples")
    shares.legend()
    for axes in (distance, shares):
        axes.set_xlabel("guidance scale")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{results[0].count:,} samples against {results[0].reference}", fontsize="medium")
    with whole_file(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
