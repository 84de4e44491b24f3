"""What samples are compared with: files of statistics, sets of pictures.

Statistics of pictures are made once and kept in ~/.cache/dit_jax/references, under a hash of the pictures, of the
weights that make their features and of how pictures get to those.

Legend: N pictures of a set, M of them whose features are kept, F features.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from dit_jax import paths
from dit_jax.buckets import BucketError
from dit_jax.config import ConfigError
from dit_jax.data import digits
from dit_jax.data.folders import FolderSource
from dit_jax.data.metadata import METADATA_FILE
from dit_jax.data.sources import open_source
from dit_jax.evaluation.features import STATISTICS, FeatureExtractor
from dit_jax.evaluation.pictures import Pictures, array_pictures, dataset_pictures, source_pictures
from dit_jax.evaluation.statistics import RunningStatistics
from dit_jax.files import cache_folder, whole_file
from dit_jax.runs.checkpoint import say

VERSION = 1  # of the kept files
KEPT = 10_000  # pictures whose features serve precision, recall and KID, as in the ADM evaluator
BATCH = 256
_FILES = {"pool": (("mu", "sigma"), ("ref_mu", "ref_sigma")), "spatial": (("mu_s", "sigma_s"),)}
_EXPECTED = (
    "expected an .npz file of statistics (mu, sigma) or pictures (arr_0), a folder of pictures or of prepare.py, or "
    "digits, folder:PATH, npz:PATH or tfds:NAME"
)

Gaussian = tuple[np.ndarray, np.ndarray]
"""Mean (F,) and covariance (F, F)."""


@dataclass(frozen=True)
class Reference:
    """What is known of the pictures that samples are compared with."""

    name: str
    hash: str
    """SHA-256 of the file, or of what identifies the pictures."""
    count: int | None
    """Pictures that were seen; None where only their statistics are known."""
    gaussians: dict[str, Gaussian] = field(default_factory=dict)
    """Of each feature in STATISTICS that is known."""
    pool: np.ndarray | None = None
    """(M, F) float32: features of the pictures, or of 10,000 of them, evenly spread."""


def check_reference(name: str) -> None:
    """Raises ConfigError, before any long work, where the name of a reference is of nothing."""
    kind = name.partition(":")[0]
    if (
        name != "digits"
        and kind not in ("folder", "npz", "tfds")
        and not paths.is_there(paths.from_user(name))
    ):
        raise ConfigError(f"--reference is {name}, where there is nothing; {_EXPECTED}")


def load_reference(
    name: str, extractor: FeatureExtractor, side: int, split: str = "train", vae: str | None = None
) -> Reference:
    """The reference of that name: a file, a folder, or a source as prepare.py knows it.

    side: of the samples, in pixels, to which a source's pictures are brought. split: of a source that has some. vae:
    of a prepared dataset, if it has moved. Raises ConfigError for what is none, or has no features of this extractor.
    """
    check_reference(name)
    if name == extractor.name == "digits":
        return _of_originals(split)
    path = paths.from_user(name)
    if paths.is_file(path):
        return _of_file(path, extractor)
    if paths.is_file(path / METADATA_FILE):
        pictures = dataset_pictures(path, vae)
    elif paths.is_folder(path) and name != "digits":
        pictures = source_pictures(FolderSource(path), side)
    else:
        pictures = source_pictures(open_source(name, split), side)
    return _of_pictures(pictures, hashlib.sha256(pictures.identity.encode()).hexdigest(), extractor)


def _of_originals(split: str) -> Reference:
    """The digits as they were, 8x8 pixels: what their referee's features of pictures are features of."""
    if split not in ("train", "test"):
        raise ConfigError(f"--split is {split!r}; expected train or test for the digits")
    pixels = digits.load_originals("test" if split == "test" else "train")[0]
    found = hashlib.sha256(pixels.tobytes()).hexdigest()
    statistics = RunningStatistics(pixels.shape[1])
    statistics.add(pixels)
    gaussian = statistics.mean, statistics.covariance
    return Reference(f"digits/{split}", found, len(pixels), {"pool": gaussian}, pixels.astype(np.float32))


def _of_file(path: pathlib.Path, extractor: FeatureExtractor) -> Reference:
    """An .npz of the ADM evaluator: arr_0 pictures (M, h, w, 3), mu, sigma, mu_s, sigma_s, or some of them."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        # Opened here: np.load leaves open what it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            gaussians = {name: of for name in _FILES if (of := _gaussian(path, arrays, name)) is not None}
            images = arrays["arr_0"] if "arr_0" in arrays.files else None
    except (ConfigError, BucketError):
        raise
    except Exception as error:  # readers of damaged files raise nearly anything
        raise ConfigError(f"--reference is {path}, which cannot be read ({error}); {_EXPECTED}") from None
    if images is None and not gaussians:
        raise ConfigError(f"--reference is {path}, which has neither mu and sigma nor arr_0; {_EXPECTED}")
    if images is None:
        return Reference(path.name, found, None, gaussians)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) < 2:
        raise ConfigError(
            f"--reference is {path} with arr_0 {images.shape} {images.dtype}; expected pictures (M, h, w, 3) uint8"
        )
    made = _of_pictures(array_pictures(path.name, found, images), found, extractor)
    # The file's statistics are of more pictures than it holds.
    return Reference(path.name, found, len(images), gaussians or made.gaussians, made.pool)


def _gaussian(path: pathlib.Path, arrays: Mapping[str, np.ndarray], feature: str) -> Gaussian | None:
    for names in _FILES[feature]:
        if all(name in arrays for name in names):
            mean, covariance = (np.asarray(arrays[name], np.float64) for name in names)
            if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
                raise ConfigError(
                    f"--reference is {path} with {names[0]} {mean.shape} and {names[1]} {covariance.shape}; "
                    "expected (F,) and (F, F)"
                )
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise ConfigError(
                    f"--reference is {path}, whose {names[0]} or {names[1]} is not finite; expected numbers"
                )
            return mean, covariance
    return None


def _of_pictures(pictures: Pictures, found: str, extractor: FeatureExtractor) -> Reference:
    """Statistics of pictures, out of the kept file or made now, and then kept."""
    extractor.check(f"--reference {pictures.name}", pictures.shape)
    if pictures.count < 2:
        raise ConfigError(f"--reference {pictures.name} has {pictures.count} pictures; expected at least 2")
    what = [VERSION, found, extractor.name, extractor.convention, extractor.weights_hash]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    file = cache_folder() / "references" / f"{key[:32]}.npz"
    kept = _read_kept(file)
    if kept is None:
        kept = _make(pictures, extractor)
        try:
            with whole_file(file) as beside, beside.open("wb") as opened:
                np.savez(opened, **kept)  # type: ignore[arg-type]
        except OSError as error:
            say(f"warning: the statistics of {pictures.name} could not be kept in {file} ({error.strerror})")
    gaussians = {
        name: (kept[f"{name}/mean"], kept[f"{name}/covariance"])
        for name in STATISTICS
        if f"{name}/mean" in kept
    }
    return Reference(pictures.name, found, pictures.count, gaussians, kept["pool"])


def _read_kept(file: pathlib.Path) -> dict[str, np.ndarray] | None:
    if not os.path.isfile(file):
        return None
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # readers of damaged files raise nearly anything
        say(f"warning: {file} cannot be read ({error}); its statistics are made again")
        return None


def _make(pictures: Pictures, extractor: FeatureExtractor) -> dict[str, np.ndarray]:
    statistics: dict[str, RunningStatistics] = {}
    rows, seen = [], 0
    chosen = np.unique(np.linspace(0, pictures.count - 1, min(KEPT, pictures.count)).astype(np.int64))
    with tqdm(total=pictures.count, unit="picture", desc=f"features of {pictures.name}") as bar:
        for images in pictures.batches(BATCH):
            found = extractor(images)
            for name in STATISTICS:
                if name in found:
                    of = statistics.setdefault(name, RunningStatistics(found[name].shape[1]))
                    of.add(found[name])
            here = chosen[(chosen >= seen) & (chosen < seen + len(images))] - seen
            rows.append(found["pool"][here])
            seen += len(images)
            bar.update(len(images))
    arrays = {"pool": np.concatenate(rows)}
    for name, of in statistics.items():
        arrays |= {f"{name}/mean": of.mean, f"{name}/covariance": of.covariance}
    return arrays
