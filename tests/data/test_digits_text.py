"""Two digits in a picture: what is held out, what captions say, what stands where."""

import dataclasses
import itertools

import numpy as np
import pytest

from dit_jax.conditions import byte_tokens
from dit_jax.config import Config, ConfigError, DataConfig, ModelConfig
from dit_jax.config.text import TextConfig
from dit_jax.data import digits, digits_text
from dit_jax.data.digits_text import ABOVE, LEFT, NAMES, captions_of, crops, facts_of, make, wordings
from dit_jax.data.latents import open_dataset


def read(caption):
    """(first, second, relation) that a caption says: an own reading of the grammar."""
    words = caption.split()
    numbers = [NAMES.index(w) if w in NAMES else int(w) for w in words if w in NAMES or w.isdigit()]
    assert len(numbers) == 2, caption
    for relation, forwards, backwards in (
        (LEFT, {"left"}, {"right"}),
        (ABOVE, {"above", "over", "top"}, {"below", "under", "beneath"}),
    ):
        if forwards & set(words):
            return (*numbers, relation)
        if backwards & set(words):
            return (*numbers[::-1], relation)
    raise AssertionError(caption)


def test_a_tenth_of_the_pairs_is_never_seen_in_training():
    held = digits_text.held_out_pairs()
    assert len(held) == 10 and all((b, a) in held and a != b for a, b in held)
    assert sorted(itertools.chain(*digits_text.HELD_OUT)) == list(range(10))
    train, test = facts_of(1800, 0, "train"), facts_of(500, 0, "test")
    assert not held & {(a, b) for a, b, _ in train.tolist()}
    _, counts = np.unique(train, axis=0, return_counts=True)
    assert counts.tolist() == [10] * 180
    assert sum((a, b) in held for a, b, _ in facts_of(400, 7, "test").tolist()) == 40
    assert len(test) == 500 and len(facts_of(0, 0, "test")) == 0


def test_captions_say_what_the_picture_shows():
    for fact in itertools.product(range(10), range(10), (LEFT, ABOVE)):
        said = wordings(fact)
        assert len(set(said)) == len(said) >= 10
        assert all(read(caption) == fact for caption in said)
        assert max(len(caption.encode()) for caption in said) < 32
    facts = facts_of(300, 3, "train")
    for fact, captions in zip(facts.tolist(), captions_of(facts, 3), strict=True):
        assert len(set(captions)) == 4 and all(read(caption) == tuple(fact) for caption in captions)
    assert "a three left of a seven" in wordings((3, 7, LEFT)) and "7 below 3" in wordings((3, 7, ABOVE))
    assert "an eight above an eight" in wordings((8, 8, ABOVE))


def test_pictures_hold_real_digits_of_their_split_at_their_places():
    made = make(200, 5, "test")
    assert made.images.shape == (200, 64, 64, 3) and made.images.dtype == np.uint8
    real, train = drawn("test"), drawn("train")
    found = [[real[crop.tobytes()] for crop in pair] for pair in crops(made.images, made.facts[:, 2])]
    np.testing.assert_array_equal(found, made.facts[:, :2])
    (top, left), (same, right) = digits_text.places(LEFT)
    assert top == same and left + 32 <= right
    (top, left), (bottom, same) = digits_text.places(ABOVE)
    assert left == same and top + 32 <= bottom
    ink = made.images.astype(int).sum(axis=(1, 2, 3))
    np.testing.assert_array_equal(
        ink, crops(made.images, made.facts[:, 2]).astype(int).sum(axis=(1, 2, 3, 4))
    )
    shown = make(60, 5, "train")
    assert all(c.tobytes() in train for pair in crops(shown.images, shown.facts[:, 2]) for c in pair)


def drawn(split):
    """The real digits of a split as pictures of two show them: their labels by their bytes."""
    features, labels = digits_text.load_originals(split)
    return {picture.tobytes(): label for picture, label in zip(digits.draw(features), labels, strict=True)}


def test_digits_keep_apart_and_keep_their_ink():
    real, labels = digits.load_originals("test")
    features, same_labels = digits_text.load_originals("test")
    np.testing.assert_array_equal(labels, same_labels)
    assert features.min() >= 0 and features.max() <= digits.MAX_INK
    ink, whole = features.reshape(-1, 8, 8), real.reshape(-1, 8, 8)
    assert np.abs(ink.sum(1) - digits_text.ROWS / 8 * whole.sum(1)).mean() < 1  # of some 40
    made = make(400, 0, "train")
    height = crops(made.images, made.facts[:, 2]).max(axis=-1).mean(axis=(0, 1, 3))  # of 255, by row
    assert height[[0, 1, 30, 31]].max() < 12 < 60 < height[[4, 27]].min()
    np.testing.assert_allclose(height[:16].sum(), height[16:].sum(), rtol=0.1)  # in the middle


def test_they_are_fixed_by_the_seed_for_good():
    one, same, other = make(40, 1, "train"), make(40, 1, "train"), make(40, 2, "train")
    np.testing.assert_array_equal(one.images, same.images)
    assert one.captions == same.captions != other.captions
    assert not np.array_equal(one.facts, other.facts)
    # Recorded: another NumPy or another machine must prepare the same set.
    assert facts_of(3, 0, "train").tolist() == [[7, 2, 1], [6, 6, 0], [5, 2, 0]]
    assert captions_of(facts_of(1, 0, "train"), 0) == [
        ("a two beneath a seven", "2 beneath 7", "a two under a seven", "two beneath seven")
    ]


def test_wrong_pictures_are_refused():
    with pytest.raises(
        ValueError, match=r"shape \(1, 72, 72, 3\) with 1 relations; expected \(N, 64, 64, 3\)"
    ):
        crops(np.zeros((1, 72, 72, 3), np.uint8), np.zeros(1, int))


def test_they_are_prepared_at_first_use(monkeypatch, tmp_path):
    monkeypatch.setattr(digits_text, "TRAINING_PICTURES", 12)
    model = ModelConfig(input_size=(16, 16), in_channels=4)
    data = DataConfig(dir=str(tmp_path / "set"), source="digits-text", mirror=False)
    config = Config(model=model, data=data, text=TextConfig(encoder="bytes", length=32))
    dataset = open_dataset(config)
    assert len(dataset) == 12 and dataset.record_shape == (1, 16, 16, 8)
    made = make(12, 0, "train")
    assert dataset.captions(range(12)) == made.captions
    condition, captions = dataset.examples(4)
    np.testing.assert_array_equal(condition["tokens"], byte_tokens(captions, 32))
    assert captions == [made.captions[i][0] for i in (0, 3, 6, 9)]
    (tmp_path / "file").touch()
    nowhere = dataclasses.replace(data, dir=str(tmp_path / "file" / "set"))
    with pytest.raises(ConfigError, match=r"^--data\.dir, the dataset's folder, is .*, where no file can be"):
        open_dataset(dataclasses.replace(config, data=nowhere))
