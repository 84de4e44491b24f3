"""The Frechet distance between two sets of features, as Gaussians.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (arXiv 1706.08500), equation 6.

Legend: N samples, F features.
"""

from __future__ import annotations

import numpy as np


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + Tr(A + B - 2 (A B)^(1/2)) of two sets of features (N, F), covariances A and B.

    In float64. Tr (A B)^(1/2) is the sum of singular values of A^(1/2) B^(1/2), which needs no root of an
    unsymmetric matrix and stays real and accurate for singular covariances (fewer samples than features).
    """
    for name, x in (("features_a", features_a), ("features_b", features_b)):
        if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] != features_a.shape[1]:
            raise ValueError(f"{name} have shape {x.shape}; expected (at least 2, {features_a.shape[-1]})")
        if not np.isfinite(x).all():
            raise ValueError(f"{name} hold values that are not finite")
    a, b = features_a.astype(np.float64), features_b.astype(np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    return frechet_of(a.mean(axis=0), cov_a, b.mean(axis=0), cov_b)


def frechet_of(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """The same of two Gaussians, of means (F,) and covariances (F, F)."""
    dim = len(mean_a)
    for name, x, shape in (
        ("mean_a", mean_a, (dim,)), ("cov_a", cov_a, (dim, dim)),
        ("mean_b", mean_b, (dim,)), ("cov_b", cov_b, (dim, dim)),
    ):  # fmt: skip
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; expected {shape}")
        if not np.isfinite(x).all():
            raise ValueError(f"{name} holds values that are not finite")
    mean_a, cov_a, mean_b, cov_b = (x.astype(np.float64) for x in (mean_a, cov_a, mean_b, cov_b))
    # The roots are symmetric ones but for rotations, which change no singular value.
    cross = np.linalg.svd(_root(cov_a).T @ _root(cov_b), compute_uv=False).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(float(distance), 0.0)  # rounding may leave a trace below zero


def _root(cov: np.ndarray) -> np.ndarray:
    """(F, r) of which the product with its transpose is a positive semidefinite matrix (F, F) of rank r."""
    values, vectors = np.linalg.eigh(cov)
    above = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, above] * np.sqrt(values[above])
