"""All metrics of a set of samples against a reference, and the result as JSON and as a table."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit_jax import leases, paths
from dit_jax.config import ConfigError
from dit_jax.evaluation.features import FeatureExtractor, Features
from dit_jax.evaluation.frechet import frechet_of
from dit_jax.evaluation.manifold import NEIGHBOURS, precision_and_recall
from dit_jax.evaluation.references import Reference
from dit_jax.evaluation.samples import Provenance
from dit_jax.evaluation.scores import SPLIT, SUBSET_SIZE, SUBSETS, inception_score, kernel_distance
from dit_jax.files import write_whole
from dit_jax.runs.checkpoint import say

FILE = "evaluations.jsonl"  # in a run's folder

# Metric -> (name in the table, how it is printed).
_TABLE = {
    "fid": ("FID", ".4f"),
    "sfid": ("sFID", ".4f"),
    "inception_score": ("Inception Score", ".3f"),
    "precision": ("precision", ".4f"),
    "recall": ("recall", ".4f"),
    "kid": ("KID", ".6f"),
    "agreement": ("read as the class asked for", ".1%"),
}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of samples, and what they are of."""

    metrics: dict[str, float]
    """`fid`, `sfid`, `inception_score`, `precision`, `recall`, `kid`, `agreement`, as far as they can be had; the
    standard deviations `inception_score_std` over splits and `kid_std` over subsets."""
    left_out: dict[str, str]
    """Metric -> why it cannot be had."""
    features: str
    """Which extractor's: `inception`, `digits`."""
    convention: str
    """How pictures are resized for it."""
    weights_hash: str | None
    """SHA-256 of its weights."""
    reference: str
    reference_hash: str
    reference_count: int | None
    """Pictures of the reference that were seen; None where it has statistics alone."""
    count: int
    """Samples."""
    settings: dict[str, int]
    """Numbers that metrics depend on."""
    provenance: Provenance = field(default_factory=Provenance)
    """Where the samples come from."""

    def to_json(self) -> str:
        """One line; what is not known is null."""
        flat: dict[str, Any] = dataclasses.asdict(self)
        return json.dumps(flat | flat.pop("provenance"))

    def table(self) -> str:
        """The result for a person to read."""
        lines = []
        for metric, (name, form) in self._rows().items():
            if metric not in self.metrics:
                continue
            spread = self.metrics.get(f"{metric}_std")
            more = "" if spread is None else f" ± {spread:{form}}"
            lines.append(f"  {name:<28}{self.metrics[metric]:>12{form}}{more}")
        whys: dict[str, list[str]] = {}
        for metric, why in self.left_out.items():
            whys.setdefault(why, []).append(self._rows()[metric][0])
        lines += [f"  left out: {', '.join(names)}: {why}" for why, names in whys.items()]
        weights = f", weights {self.weights_hash[:12]}" if self.weights_hash else ""
        pictures = "statistics" if self.reference_count is None else f"{self.reference_count:,} pictures"
        head = (
            f"{self.count:,} samples against {pictures} of {self.reference} ({self.reference_hash[:12]}), "
            f"{self.features} features ({self.convention}{weights}):"
        )
        return "\n".join([head, *lines])

    def _rows(self) -> dict[str, tuple[str, str]]:
        """Metric -> (name, how it is printed): FID and KID are names of distances in Inception's features."""
        if self.features == "inception":
            return _TABLE
        return _TABLE | {"fid": ("Frechet distance", ".4f"), "kid": ("kernel distance", ".4f")}


def evaluate(
    samples: Features,
    reference: Reference,
    extractor: FeatureExtractor,
    labels: np.ndarray | None = None,
    provenance: Provenance | None = None,
) -> Evaluation:
    """All metrics that samples and reference give. labels: classes (N,) asked for, in the samples' order.

    Raises ConfigError for fewer than two samples and a reference of other features.
    """
    if len(samples) < 2:
        raise ConfigError(
            f"the samples are {len(samples)}; expected at least 2, a distance needs their covariance"
        )
    metrics: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for metric, feature in (("fid", "pool"), ("sfid", "spatial")):
        why = _no_distance(samples, reference, extractor, feature)
        if why:
            left_out[metric] = why
            continue
        mine = samples.statistics[feature]
        metrics[metric] = frechet_of(mine.mean, mine.covariance, *reference.gaussians[feature])
    if samples.has("logits"):
        mean, std = inception_score(samples.rows("logits"))
        metrics |= {"inception_score": mean, "inception_score_std": std}
    else:
        left_out["inception_score"] = f"the {extractor.name} features have no logits"
    settings = {"inception_score_split": SPLIT, "neighbours": NEIGHBOURS, "kid_subsets": SUBSETS}
    if reference.pool is None:
        left_out |= dict.fromkeys(("precision", "recall", "kid"), f"{reference.name} has no pictures (arr_0)")
    else:
        _of_pairs(samples.rows("pool"), reference, metrics, left_out, settings)
    if samples.has("read") and labels is not None:
        metrics["agreement"] = float(np.mean(samples.rows("read") == labels))
    return Evaluation(
        metrics, left_out, extractor.name, extractor.convention, extractor.weights_hash, reference.name,
        reference.hash, reference.count, len(samples), settings, provenance or Provenance(),
    )  # fmt: skip


def _of_pairs(
    pool: np.ndarray,
    reference: Reference,
    metrics: dict[str, float],
    left_out: dict[str, str],
    settings: dict[str, int],
) -> None:
    """The metrics of pairs of pictures, a sample (N, F) and a reference."""
    assert reference.pool is not None
    _check_dimensions(reference, pool.shape[1], reference.pool.shape[1])
    fewest = min(len(pool), len(reference.pool))
    if fewest > NEIGHBOURS:
        metrics["precision"], metrics["recall"] = precision_and_recall(pool, reference.pool)
    else:
        why = f"the smaller set is of {fewest} pictures; expected above {NEIGHBOURS}"
        left_out |= dict.fromkeys(("precision", "recall"), why)
    settings["kid_subset_size"] = min(SUBSET_SIZE, fewest)
    mean, std = kernel_distance(pool, reference.pool, SUBSETS, settings["kid_subset_size"])
    metrics |= {"kid": mean, "kid_std": std}


def _no_distance(
    samples: Features, reference: Reference, extractor: FeatureExtractor, feature: str
) -> str | None:
    """Why there is no Frechet distance in these features; None where there is."""
    if feature not in samples.statistics:
        return f"there are no {feature} features in the {extractor.name} features"
    if feature not in reference.gaussians:
        names = {"pool": "mu and sigma", "spatial": "mu_s and sigma_s"}[feature]
        return f"{reference.name} has no {names}"
    _check_dimensions(reference, samples.statistics[feature].dim, len(reference.gaussians[feature][0]))
    return None


def _check_dimensions(reference: Reference, ours: int, theirs: int) -> None:
    if ours != theirs:
        raise ConfigError(f"--reference {reference.name} is of {theirs} features; the samples' are {ours}")


def append_evaluation(workdir: pathlib.Path, evaluation: Evaluation) -> None:
    """One more line in the run's evaluations.jsonl; a warning where it cannot be written."""
    append_line(workdir / FILE, evaluation.to_json())


def append_line(file: pathlib.Path, line: str) -> None:
    """Add a line to a file of results; a warning where it cannot be written.

    A bucket knows no end of an object: there it is written anew, by one command at a time.
    """
    try:
        if not paths.is_remote(file):
            with file.open("a") as opened:
                opened.write(line + "\n")
            return
        # Who slept while it held the file, and lost it, is told so when it writes.
        with leases.leased(file.with_name(f".{file.name}.lock"), lambda _: None, wait=True):
            before = paths.read_bytes(file).decode() if paths.is_file(file) else ""
            write_whole(file, before + line + "\n")
    except OSError as error:
        say(f"warning: {file} cannot be written ({error.strerror or error}); the result is not in it")
