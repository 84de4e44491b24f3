"""The embedded dataset with captions: two real digits in a picture, and where they stand to each other in words.

A picture is told by three numbers, its facts: the left or upper digit, the right or lower one, and the relation,
LEFT (side by side) or ABOVE (one above the other). Everything here is a pure function of its arguments.

Legend: N pictures.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dit_jax.data import digits
from dit_jax.data.digits import NUM_CLASSES, Split

SIZE = 64  # side of a picture: two digits of 32, each on whole patches of 16 pixels in either relation
FAR = SIZE - digits.SIZE
MIDDLE = FAR // 2
LEFT, ABOVE = 0, 1
ROWS = 6.5  # height of a digit, in the middle of eight rows: they fill all of theirs, and would touch
TRAINING_PICTURES = 3600  # 20 of each pair and relation
CAPTIONS = 4  # of a picture, each in other words

HELD_OUT = ((0, 7), (1, 4), (2, 9), (3, 6), (5, 8))
"""Pairs that no training picture shows, in either order and relation: a tenth of the hundred ordered pairs. Each
digit is in one of them, so that each is seen beside all others but one."""

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Phrases between first and second digit, and between second and first.
PHRASES = {
    LEFT: (("left of", "to the left of"), ("right of", "to the right of")),
    ABOVE: (("above", "over", "on top of"), ("below", "under", "beneath")),
}


class Pictures(NamedTuple):
    """Pictures with their captions and facts."""

    images: np.ndarray
    """(N, 64, 64, 3) uint8, white on black."""
    captions: list[tuple[str, ...]]
    """CAPTIONS of each picture."""
    facts: np.ndarray
    """(N, 3) int32: first digit, second digit, relation."""


def held_out_pairs() -> frozenset[tuple[int, int]]:
    """The ordered pairs of digits that are never seen together in training."""
    return frozenset(HELD_OUT) | {(b, a) for a, b in HELD_OUT}


def facts_of(count: int, seed: int, split: Split) -> np.ndarray:
    """Facts (count, 3) int32 of pictures: of `train` without the pairs held out, of `test` with them.

    All pairs and relations come in turn, each round of them in an order of its own.
    """
    held = held_out_pairs() if split == "train" else ()
    every = np.asarray(
        [
            (first, second, relation)
            for first in range(NUM_CLASSES)
            for second in range(NUM_CLASSES)
            for relation in (LEFT, ABOVE)
            if (first, second) not in held
        ],
        np.int32,
    )
    rounds = [_order(seed, i, len(every)) for i in range(-(-count // len(every)))]
    return every[np.concatenate([*rounds, np.zeros(0, np.int64)])[:count]]


def wordings(fact: np.ndarray | tuple[int, int, int]) -> tuple[str, ...]:
    """All captions of a picture with these facts: in words, with articles, in numerals; seen from either digit."""
    first, second, relation = (int(part) for part in fact)
    forwards, backwards = PHRASES[relation]
    ways = [(first, phrase, second) for phrase in forwards]
    ways += [(second, phrase, first) for phrase in backwards]
    found = []
    for a, phrase, b in ways:
        found += [f"{NAMES[a]} {phrase} {NAMES[b]}", f"{a} {phrase} {b}"]
        if not phrase.startswith("to the "):  # which with articles is longer than 32 tokens of bytes
            found.append(f"{_article(a)} {phrase} {_article(b)}")
    return tuple(found)


def captions_of(facts: np.ndarray, seed: int) -> list[tuple[str, ...]]:
    """CAPTIONS different captions for each of the facts (N, 3)."""
    said = [wordings(fact) for fact in facts]
    words = _words(seed, 1, len(facts) * max(map(len, said), default=0)).reshape(len(facts), -1)
    orders = [np.argsort(row[: len(ways)], kind="stable") for row, ways in zip(words, said, strict=True)]
    return [tuple(ways[i] for i in order[:CAPTIONS]) for ways, order in zip(said, orders, strict=True)]


def load_originals(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The real 8x8 images drawn ROWS high, as features (N, 64) in 0..16, and labels (N,) int32."""
    from PIL import Image

    features, labels = digits.load_originals(split)
    eye = Image.fromarray(np.pad(np.eye(8, dtype=np.float32), ((2, 2), (0, 0))))
    box = (0, 6 - 32 / ROWS, 8, 6 + 32 / ROWS)  # 64 / ROWS rows about the middle become eight
    shrink = np.asarray(eye.resize((8, 8), Image.Resampling.LANCZOS, box), np.float64)  # keeps thin strokes
    rows = np.clip(shrink @ features.reshape(-1, 8, 8), 0, digits.MAX_INK)
    return rows.reshape(-1, 64), labels


def make(count: int, seed: int, split: Split) -> Pictures:
    """Pictures of digits of a split of the real ones, with captions; of `train` without the pairs held out."""
    features, labels = load_originals(split)
    images = digits.draw(features)
    facts = facts_of(count, seed, split)
    canvas = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    words = _words(seed, 2, 2 * count).reshape(count, 2)
    of_class = [np.flatnonzero(labels == digit) for digit in range(NUM_CLASSES)]
    for picture, (*pair, relation), row in zip(canvas, facts.tolist(), words, strict=True):
        for digit, (top, left), word in zip(pair, places(relation), row, strict=True):
            chosen = images[of_class[digit][int(word) % len(of_class[digit])]]
            picture[top : top + digits.SIZE, left : left + digits.SIZE] = chosen
    return Pictures(canvas, captions_of(facts, seed), facts)


def places(relation: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left) of the first and the second digit, which are 32x32."""
    return ((MIDDLE, 0), (MIDDLE, FAR)) if relation == LEFT else ((0, MIDDLE), (FAR, MIDDLE))


def crops(images: np.ndarray, relations: np.ndarray) -> np.ndarray:
    """What stands at the two places of pictures (N, 64, 64, 3): (N, 2, 32, 32, 3)."""
    side = digits.SIZE
    if images.shape[1:3] != (SIZE, SIZE) or len(images) != len(relations):
        raise ValueError(
            f"images have shape {images.shape} with {len(relations)} relations; expected (N, {SIZE}, {SIZE}, 3) and N"
        )
    found = [
        [image[top : top + side, left : left + side] for top, left in places(int(relation))]
        for image, relation in zip(images, relations, strict=True)
    ]
    return np.asarray(found, images.dtype).reshape(len(images), 2, side, side, *images.shape[3:])


def _article(digit: int) -> str:
    return f"{'an' if NAMES[digit] == 'eight' else 'a'} {NAMES[digit]}"


def _words(seed: int, purpose: int, count: int) -> np.ndarray:
    """Raw 64-bit words: NumPy promises the stream of a bit generator, but not that of a Generator's methods."""
    return np.random.Philox(key=np.array([seed, purpose], np.uint64)).random_raw(count)


def _order(seed: int, number: int, n: int) -> np.ndarray:
    return np.argsort(_words(seed, 3 + number, n), kind="stable")
