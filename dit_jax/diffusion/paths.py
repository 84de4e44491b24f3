"""Paths from noise to data, x_t = alpha_t x0 + sigma_t eps, in SiT's direction of time: t = 0 noise, t = 1 data.

| path   | alpha           | sigma           |                                                                    |
|--------|-----------------|-----------------|--------------------------------------------------------------------|
| linear | t               | 1 - t           | rectified flow (arXiv 2209.03003), SiT's default                   |
| gvp    | sin(pi t / 2)   | cos(pi t / 2)   | variance preserving on a circle (arXiv 2303.08797)                 |
| vp     | exp(-B(1 - t)/2)| sqrt(1 - alpha^2)| DDPM's limit (arXiv 2011.13456), B the integral of beta, 0.1 to 20|

Names and formulas follow SiT (Ma et al., arXiv 2401.08740, section 2 and appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.predictions import Point

PathName = Literal["linear", "gvp", "vp"]
BETA_MIN, BETA_MAX = 0.1, 20.0  # of the VP path


def linear(t: Any, xp: Any) -> Point:
    """Straight lines at constant speed."""
    one = xp.ones_like(t)
    return Point(t, 1 - t, one, -one)


def gvp(t: Any, xp: Any) -> Point:
    """A quarter of a circle at constant speed."""
    speed = math.pi / 2
    sin, cos = xp.sin(speed * t), xp.cos(speed * t)
    return Point(sin, cos, speed * cos, -speed * sin)


def vp(t: Any, xp: Any) -> Point:
    """The variance-preserving SDE with linear beta, from t = 0 (noise) to 1."""
    s = 1 - t
    log_alpha = -0.25 * s * s * (BETA_MAX - BETA_MIN) - 0.5 * s * BETA_MIN
    half_beta = 0.5 * (BETA_MIN + s * (BETA_MAX - BETA_MIN))  # the derivative of log alpha
    alpha, sigma = xp.exp(log_alpha), xp.sqrt(-xp.expm1(2 * log_alpha))
    return Point(alpha, sigma, alpha * half_beta, -alpha * alpha * half_beta / sigma)


PATHS: dict[str, Callable[[Any, Any], Point]] = {"linear": linear, "gvp": gvp, "vp": vp}


def point(path: PathName, t: Any) -> Point:
    """Levels and derivatives at times t: NumPy float64 for numbers and NumPy arrays, else JAX arrays."""
    if isinstance(t, jax.Array):
        return PATHS[path](t.astype(jnp.float32), jnp)
    return PATHS[path](np.asarray(t, np.float64), np)
