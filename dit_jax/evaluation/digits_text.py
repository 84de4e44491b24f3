"""The referee of pictures of two digits: both digits, and where they stand, as the caption says.

It reads each of the two places that the caption's relation names, 32x32 pixels, with the classifier of single digits
(`evaluation.digits`), fitted on real 8x8 images only, as these pictures draw them. A picture is right where it reads
both digits so.

Legend: N pictures.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from dit_jax.config import ConfigError
from dit_jax.data import digits, digits_text
from dit_jax.evaluation.digits import fit_referee

SEED = 0


def prompts(count: int) -> list[str]:
    """Captions of test pictures: all pairs in turn, of which a tenth was held out of training, in all wordings."""
    facts = digits_text.facts_of(count, SEED, "test")
    return [captions[0] for captions in digits_text.captions_of(facts, SEED)]


@functools.cache
def _facts() -> dict[str, tuple[int, int, int]]:
    """What each caption says."""
    every = itertools.product(range(digits.NUM_CLASSES), range(digits.NUM_CLASSES), digits_text.PHRASES)
    return {caption: fact for fact in every for caption in digits_text.wordings(fact)}


def facts_of(captions: Sequence[str]) -> np.ndarray:
    """What captions say, (N, 3) int32: first digit, second digit, relation. ConfigError for another caption."""
    for caption in captions:
        if caption not in _facts():
            raise ConfigError(
                f"the samples show {caption[:80]!r}; expected two digits, such as {prompts(1)[0]!r}, for this referee"
            )
    return np.asarray([_facts()[caption] for caption in captions], np.int32).reshape(-1, 3)


def agreement(images: np.ndarray, facts: np.ndarray) -> np.ndarray:
    """Which pictures (N, 64, 64, C) uint8 show what the facts (N, 3) say, (N,) bool."""
    places = digits_text.crops(images, facts[:, 2])  # (N, 2, 32, 32, C)
    referee = fit_referee(digits_text.load_originals)
    read = [referee.predict(digits.to_8x8(places[:, place])) == facts[:, place] for place in (0, 1)]
    return np.logical_and(*read)


def report(images: np.ndarray, captions: Sequence[str]) -> str:
    """What the referee says of generated pictures, beside real ones, as text. ConfigError for other samples."""
    size = digits_text.SIZE
    if images.shape[1:3] != (size, size) or len(images) != len(captions):
        raise ConfigError(
            f"the samples have shape {images.shape} and {len(captions)} captions; expected {size}x{size} pictures of "
            "two digits, with a caption each"
        )
    facts = facts_of(captions)
    right = agreement(images, facts)
    held = digits_text.held_out_pairs()
    unseen = np.asarray([(first, second) in held for first, second, _ in facts.tolist()], bool)
    real = digits_text.make(len(captions), SEED, "test")
    lines = [
        f"{len(images)} pictures of two digits, judged by a classifier fitted on real digits:",
        f"  both digits and their places as the caption says {right.mean():7.1%}"
        f"   (real test digits {agreement(real.images, real.facts).mean():.1%})",
    ]
    if unseen.any():
        lines.append(
            f"  of pairs that training never showed together     {right[unseen].mean():7.1%}"
            f"   ({unseen.sum()} pictures)"
        )
    return "\n".join(lines)
