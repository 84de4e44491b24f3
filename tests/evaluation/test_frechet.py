"""The Frechet distance against closed forms and SciPy's matrix root."""

import numpy as np
import pytest

from dit_jax.evaluation.frechet import frechet_distance, frechet_of


def test_against_the_matrix_root():
    import scipy.linalg

    rng = np.random.default_rng(0)
    a = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6))
    b = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 6)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(
        cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_scaling_and_shifting_has_a_closed_form():
    x = np.random.default_rng(0).standard_normal((100, 3))
    # Covariance s^2 S: the distance of x to s x + m is |(s - 1) mean + m|^2 + (s - 1)^2 tr S.
    s, m = 3.0, np.array([1.0, -2.0, 0.5])
    expected = np.sum(((s - 1) * x.mean(0) + m) ** 2) + (s - 1) ** 2 * np.trace(np.cov(x, rowvar=False))
    assert frechet_distance(x, s * x + m) == pytest.approx(expected, rel=1e-9)


def test_zero_for_the_same_set_even_with_singular_covariance():
    x = np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32)  # rank 9 of 64
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(x, x + 1) == pytest.approx(64, rel=1e-6)


def test_bad_features_are_refused():
    good = np.zeros((4, 3))
    with pytest.raises(ValueError, match=r"features_b have shape \(4, 2\); expected \(at least 2, 3\)"):
        frechet_distance(good, good[:, :2])
    with pytest.raises(ValueError, match=r"features_a have shape \(1, 3\)"):
        frechet_distance(good[:1], good)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(good, good * np.nan)
    with pytest.raises(ValueError, match=r"cov_b has shape \(2, 2\); expected \(3, 3\)"):
        frechet_of(good[0], np.eye(3), good[0], np.eye(2))
    with pytest.raises(ValueError, match="mean_b holds values that are not finite"):
        frechet_of(good[0], np.eye(3), good[0] + np.inf, np.eye(3))
