"""The Inception Score and the kernel distance.

Legend: N samples, M references, F features, K classes.
"""

from __future__ import annotations

import numpy as np

SPLIT = 5000  # samples that the ADM evaluator takes for one score
SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # as torch-fidelity's defaults


def inception_score(logits: np.ndarray, split: int = SPLIT) -> tuple[float, float]:
    """(mean, standard deviation over splits) of exp E KL(p(y|x) || p(y)), from logits (N, K), in float64.

    Salimans et al., "Improved Techniques for Training GANs" (arXiv 1606.03498), section 4. As the ADM evaluator: in
    the order of the samples, each split with a p(y) of its own, the last one perhaps shorter.
    """
    scores = []
    for start in range(0, len(logits), split):
        x = logits[start : start + split].astype(np.float64)
        x = x - x.max(axis=1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        of_all = np.log(p.mean(axis=0, keepdims=True))
        scores.append(np.exp((p * (log_p - of_all)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    samples: np.ndarray,
    references: np.ndarray,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> tuple[float, float]:
    """(mean, standard deviation over subsets) of the squared maximum mean discrepancy, unbiased, so below 0 perhaps.

    Binkowski et al., "Demystifying MMD GANs" (arXiv 1801.01401), equation 4 with the kernel (x y / F + 1)^3, of
    features (N, F) and (M, F), in float64. Subsets are torch-fidelity's for the same seed. Raises ValueError for
    fewer features than a subset takes.
    """
    least = min(len(samples), len(references))
    if not 2 <= subset_size <= least:
        raise ValueError(f"subset_size is {subset_size}; expected 2 to {least}, the smaller set's size")
    rng, found = np.random.RandomState(seed), []
    for _ in range(subsets):
        x = samples[rng.choice(len(samples), subset_size, replace=False)].astype(np.float64)
        y = references[rng.choice(len(references), subset_size, replace=False)].astype(np.float64)
        same = _sum_off_diagonal(_kernel(x, x)) + _sum_off_diagonal(_kernel(y, y))
        found.append(same / (subset_size * (subset_size - 1)) - 2 * _kernel(x, y).mean())
    return float(np.mean(found)), float(np.std(found))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    k = x @ y.T / x.shape[1] + 1
    return k * k * k


def _sum_off_diagonal(k: np.ndarray) -> float:
    return float(k.sum() - np.trace(k))
