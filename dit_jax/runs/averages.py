"""The averages of the parameters that a run keeps, and EDM2's combinations of them after training.

A power-function average (Karras et al., arXiv 2312.02696, section 3) weighs the parameters of time tau by
tau^gamma up to now, t: its length grows with training. From snapshots of two of them, any other width can be
made after training as a linear combination (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.config import OptimConfig


def num_averages(config: OptimConfig) -> int:
    """How many averages a run keeps: the main one, further decays, power functions, in this order."""
    return 1 + len(config.ema_more) + len(config.ema_sigma_rel)


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent whose average has this standard deviation, relative to the length of training.

    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), solved for its largest real gamma: with
    1 / sigma_rel^2 = s it is gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s = 0 (EDM2, eq. 3 and Algorithm 2).
    """
    s = sigma_rel**-2
    roots = np.roots([1, 7, 16 - s, 12 - s])
    return float(roots[np.isreal(roots)].real.max())


def profile_product(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> np.ndarray:
    """Inner product over time of two averages' weights, float64.

    The weights of an average of exponent g taken at time t are (g + 1) tau^g / t^(g + 1) for tau <= t, whose
    product integrates to (a + 1)(b + 1) / (a + b + 1) * min^(a + b + 1) / (t_a^(a + 1) t_b^(b + 1)).
    """
    t_a, gamma_a, t_b, gamma_b = (np.asarray(x, np.float64) for x in (t_a, gamma_a, t_b, gamma_b))
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    exponent_of_later = np.where(t_a >= t_b, gamma_a, gamma_b)  # the powers partly cancel: no overflow
    ratio = (earlier / later) ** exponent_of_later
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / later


def combination(
    times: Sequence[float], gammas: Sequence[float], target_time: float, target_gamma: float
) -> np.ndarray:
    """Coefficients (n,) of the n given averages whose combination comes closest to the target's weights.

    Least squares over the weights' functions of time (EDM2, eq. 4), in float64.
    """
    t, g = np.asarray(times, np.float64), np.asarray(gammas, np.float64)
    a = profile_product(t[:, None], g[:, None], t[None], g[None])
    b = profile_product(t, g, target_time, target_gamma)
    return np.linalg.lstsq(a, b, rcond=None)[0]
