"""Scores and distances of given features: torch-fidelity's recorded values, brute force, ADM's own words."""

import numpy as np
import pytest

from dit_jax.evaluation import manifold
from dit_jax.evaluation.frechet import frechet_distance
from dit_jax.evaluation.manifold import precision_and_recall
from dit_jax.evaluation.scores import inception_score, kernel_distance


@pytest.fixture(scope="module")
def both(recorder):
    """The recorded metrics' samples (300, 8) and references (250, 8)."""
    return recorder.sets(300, 8, 1), recorder.sets(250, 8, 2)


def brute_force(samples, references, k):
    def distances(a, b):
        return ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1)

    radii = [np.sort(distances(x, x), axis=1)[:, k] for x in (samples, references)]
    precision = (distances(samples, references) <= radii[1]).any(axis=1).mean()
    return precision, (distances(references, samples) <= radii[0]).any(axis=1).mean()


def test_metrics_of_given_features_are_torch_fidelitys(recorder, recorded, both):
    mean, std = kernel_distance(*both, subsets=20, subset_size=100)
    assert mean == pytest.approx(recorded["metrics/kernel/mean"], rel=1e-5)
    assert std == pytest.approx(recorded["metrics/kernel/std"], rel=1e-4)
    mean, std = inception_score(recorder.logits(), split=20)
    assert mean == pytest.approx(recorded["metrics/inception/mean"], rel=1e-9)
    assert std == pytest.approx(recorded["metrics/inception/std"], rel=1e-9)
    precision, recall = precision_and_recall(*both)
    assert precision == pytest.approx(recorded["metrics/precision/precision"], abs=1e-6)
    assert recall == pytest.approx(recorded["metrics/recall/recall"], abs=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_brute_forces_whatever_the_blocks(both, k, monkeypatch):
    samples, references = both
    shifted = samples + 1000  # far from the origin, where float32 has few digits left
    assert precision_and_recall(shifted, references + 1000, k) == pytest.approx(
        brute_force(shifted, references + 1000, k), abs=1e-9
    )
    expected = brute_force(samples, references, k)
    for rows, columns in ((1024, 4096), (64, 128), (7, 11), (300, 100)):
        monkeypatch.setattr(manifold, "ROWS", rows)
        monkeypatch.setattr(manifold, "COLUMNS", columns)
        assert precision_and_recall(samples, references, k) == pytest.approx(expected, abs=1e-9), (
            rows,
            columns,
        )


def test_precision_and_recall_of_few_and_of_far(both):
    samples, references = both
    assert precision_and_recall(references, references) == (1, 1)
    assert precision_and_recall(samples + 100, references) == (0, 0)
    one = np.repeat(
        references[:1], 10, axis=0
    )  # one picture again and again: precise, and recalls itself alone
    precision, recall = precision_and_recall(one, references)
    assert precision == 1 and recall <= 1 / len(references)
    with pytest.raises(ValueError, match=r"samples have shape \(3, 8\); expected \(above 3, 8\)"):
        precision_and_recall(samples[:3], references)


def test_inception_score_is_the_evaluators(recorder):
    logits = np.concatenate([recorder.logits(), 2 * recorder.logits()[:15]])
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(
        axis=1, keepdims=True
    )  # its own words: a softmax, then splits in file order, the last one short
    scores = []
    for i in range(0, len(p), 25):
        part = p[i : i + 25]
        kl = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        scores.append(np.exp(np.mean(np.sum(kl, 1))))
    assert inception_score(logits, split=25) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    assert inception_score(np.zeros((10, 5)))[0] == pytest.approx(1)
    sure = np.full((50, 5), -2000.0)  # probabilities of 0 in float64
    sure[np.arange(50), np.arange(50) % 5] = 0
    assert inception_score(sure)[0] == pytest.approx(5)


def test_kernel_distance_is_unbiased_and_refuses_too_few():
    rng = np.random.default_rng(0)
    same = [
        kernel_distance(*rng.standard_normal((2, 60, 4)), subsets=10, subset_size=30)[0] for _ in range(40)
    ]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0
    with pytest.raises(ValueError, match="subset_size is 1000; expected 2 to 20, the smaller set's size"):
        kernel_distance(np.zeros((20, 4)), np.zeros((30, 4)))


def test_frechet_distance_of_many_features_against_the_matrix_root():
    import scipy.linalg

    rng = np.random.default_rng(0)
    a = rng.standard_normal((900, 200)) @ rng.standard_normal((200, 200))
    b = rng.standard_normal((700, 200)) @ rng.standard_normal((200, 200)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
