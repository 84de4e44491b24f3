"""Noise schedules: the variance beta_t added at every step of the forward process, in float64.

T is the number of training timesteps.
"""

from __future__ import annotations

import numpy as np

SCHEDULES = ("linear", "squaredcos_cap_v2")


def make_betas(schedule: str, num_timesteps: int) -> np.ndarray:
    """The betas (T,) of a named schedule, float64.

    linear: from 1e-4 to 0.02 at T = 1000 (Ho et al., arXiv 2006.11239); both ends scale with 1000 / T, which
    keeps the total noise.
    squaredcos_cap_v2: alphas_cumprod follows a squared cosine (Nichol & Dhariwal, arXiv 2102.09672, eq. 17),
    betas capped at 0.999.

    Raises ValueError for an unknown name, or a T for which a beta would reach 1 (linear needs T > 20).
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps is {num_timesteps}; expected at least 2")
    if schedule == "linear":
        scale = 1000 / num_timesteps
        betas = np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)
        if betas[-1] >= 1:
            raise ValueError(
                f"num_timesteps is {num_timesteps}; expected more than 20 for the linear schedule"
            )
        return betas
    if schedule == "squaredcos_cap_v2":
        grid = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
        alpha_bar = np.cos((grid + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise ValueError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}")
