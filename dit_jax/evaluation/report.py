"""A file of samples against a reference: what evaluate.py --npz --reference measures."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
from tqdm import tqdm

from dit_jax import paths
from dit_jax.config import ConfigError
from dit_jax.evaluation.features import FeatureExtractor, digits_extractor, features_of
from dit_jax.evaluation.inception import inception_extractor
from dit_jax.evaluation.metrics import Evaluation, append_evaluation, evaluate
from dit_jax.evaluation.references import check_reference, load_reference
from dit_jax.evaluation.samples import load_pictures, load_provenance
from dit_jax.files import check_file, write_whole
from dit_jax.interop.inception import RELEASE, VARIABLE
from dit_jax.models.inception import Convention

FeatureName = Literal["inception", "digits"]


def choose_extractor(
    features: FeatureName | None, inception: str | None, convention: Convention, of_digits: bool
) -> FeatureExtractor:
    """The features of that name; None: Inception's where its weights are named, else the referee's of digits.

    of_digits: whether samples are compared with the digits, which their referee knows. Raises ConfigError where there
    are no weights, or they do not fit.
    """
    named = inception or os.environ.get(VARIABLE)
    if features == "digits" or (features is None and not named and of_digits):
        return digits_extractor()
    if features is None and not named:
        raise ConfigError(
            f"--inception is not given and ${VARIABLE} is not set; expected the file of weights {RELEASE}, or "
            "--features digits, which measures pictures of the digits in the pixels of their referee"
        )
    return inception_extractor(inception, convention)


def compares_with_digits(reference: str) -> bool:
    """Whether a reference's name is that of the embedded digits, or of a dataset of them."""
    from dit_jax.data.metadata import METADATA_FILE, load_metadata

    if reference == "digits":
        return True
    path = paths.from_user(reference)
    return paths.is_file(path / METADATA_FILE) and load_metadata(path).source.startswith("digits/")


def evaluate_file(
    npz: str,
    reference: str,
    features: FeatureName | None = None,
    inception: str | None = None,
    convention: Convention = "adm",
    split: str = "train",
    vae: str | None = None,
    out: str | None = None,
) -> Evaluation:
    """Metrics of the samples in a file; written to `out` as JSON, and appended to the evaluations of their run.

    Raises ConfigError for what cannot be read, does not fit, or has no place to be written to.
    """
    if out is not None:
        check_file("--out", out)
    check_reference(reference)
    images, labels = load_pictures(npz)
    provenance = load_provenance(npz)
    extractor = choose_extractor(features, inception, convention, compares_with_digits(reference))
    extractor.check(f"--npz {npz}", images.shape)
    if len(images) < 2:
        raise ConfigError(f"--npz {npz} has {len(images)} samples; expected at least 2")
    of = load_reference(reference, extractor, min(images.shape[1:3]), split, vae)
    if images.shape[-1] == 1:
        images = np.broadcast_to(images, (*images.shape[:3], 3))
    with tqdm(total=len(images), unit="picture", desc="features of the samples") as bar:
        found = features_of(extractor, images, told=lambda count: bar.update(count))
    evaluation = evaluate(found, of, extractor, labels, provenance)
    if out is not None:
        write_whole(out, evaluation.to_json() + "\n")
    if provenance.run is not None and paths.is_folder(provenance.run):
        append_evaluation(paths.to_path(provenance.run), evaluation)
    return evaluation
