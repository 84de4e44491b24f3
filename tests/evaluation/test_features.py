"""Features of a set: the same in whatever batches and by whatever processes they come."""

import numpy as np
import pytest

from dit_jax.data.digits import load_digits, load_originals
from dit_jax.evaluation.features import Features, digits_extractor, features_of, joined
from dit_jax.evaluation.frechet import frechet_distance, frechet_of


@pytest.fixture(scope="module")
def extractor():
    return digits_extractor()


def test_batches_of_several_processes_give_the_features_of_all(extractor, tmp_path):
    images, _ = load_digits("test")
    whole = features_of(extractor, images)
    parts = [Features(), Features(), Features()]
    for i, start in enumerate(range(0, len(images), 100)):
        index = np.arange(start, min(start + 100, len(images)))[::-1]
        parts[i % 2].add(index, extractor(images[index]))
    np.savez(tmp_path / "part.npz", **parts[0].to_arrays())
    with np.load(tmp_path / "part.npz") as stored:
        parts[0] = Features.from_arrays(stored)
    found = joined([Features.from_arrays(parts[2].to_arrays()), *parts[:2]])
    np.testing.assert_array_equal(found.index, np.arange(len(images)))
    for name in ("pool", "read"):
        assert found.has(name)
        np.testing.assert_array_equal(found.rows(name), whole.rows(name))
    assert not found.has("logits")
    ours, all_of = found.statistics["pool"], whole.statistics["pool"]
    np.testing.assert_allclose(ours.covariance, all_of.covariance, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"features of 364 pictures; expected one of each"):
        joined([found, parts[1]])


def test_features_of_the_digits_are_those_of_their_referee(extractor):
    images, labels = load_digits("test")
    found = features_of(extractor, images)
    assert np.mean(found.rows("read") == labels) >= 0.985
    train = load_originals("train")[0]
    real = train.astype(np.float64)
    distance = frechet_of(
        found.statistics["pool"].mean, found.statistics["pool"].covariance, real.mean(axis=0), np.cov(real.T)
    )
    assert distance == pytest.approx(frechet_distance(found.rows("pool"), train), rel=1e-9)


def test_what_is_no_picture_is_refused(extractor):
    with pytest.raises(ValueError, match=r"images have shape \(2, 32, 32, 3\) and type float64; expected"):
        extractor(np.zeros((2, 32, 32, 3)))
    with pytest.raises(ValueError, match=r"shape \(0, 32, 32, 3\)"):
        extractor(np.zeros((0, 32, 32, 3), np.uint8))
    features = features_of(extractor, load_digits("test")[0][:2])
    with pytest.raises(ValueError, match="features are pool; expected pool, read, as before"):
        features.add(np.arange(1), {"pool": np.zeros((1, 64))})
