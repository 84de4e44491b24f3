"""Which times a continuous process trains on: distributions on (0, 1), with t = 0 noise and t = 1 data.

uniform; logit-normal, mode and cosmap (Esser et al., SD3, arXiv 2403.03206, section 3.1); and SD3's shift for the
resolution (section 5.3.2). SD3's own time is 1 - t: its logit-normal with mean m is the one with mean -m here, the
other two are symmetric, and its shift above 1 means more noise here as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

DistributionName = Literal["uniform", "logit_normal", "mode", "cosmap"]


@dataclass(frozen=True)
class TimeDistribution:
    """A distribution of training times."""

    kind: DistributionName = "uniform"
    mean: float = 0.0
    """Of the logit-normal's logit; above 0 favours times near the data."""
    std: float = 1.0
    """Of the logit-normal's logit."""
    mode_scale: float = 1.29
    """Of mode: -1 favours both ends, 2 / (pi - 2) the middle."""
    shift: float = 1.0
    """Times are moved towards the noise by `shifted`, last of all."""

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "logit_normal", "mode", "cosmap"):
            raise ValueError(f"kind is {self.kind!r}; expected uniform, logit_normal, mode or cosmap")
        if not self.std > 0 or not self.shift > 0:
            raise ValueError(f"std is {self.std} and shift {self.shift}; expected numbers above 0")
        if not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ValueError(f"mode_scale is {self.mode_scale}; expected -1 to {2 / (math.pi - 2):.4f}")

    def draw(self, key: jax.Array, n: int) -> jax.Array:
        """n times, (n,) float32, each strictly between 0 and 1."""
        if self.kind == "logit_normal":
            t = jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (n,), jnp.float32))
        else:
            u = jax.random.uniform(key, (n,), jnp.float32)
            t = {"uniform": lambda u: u, "mode": self._mode, "cosmap": _cosmap}[self.kind](u)
        tiny = jnp.finfo(jnp.float32).eps
        return jnp.clip(shifted(t, self.shift), tiny, 1 - tiny)

    def _mode(self, u: jax.Array) -> jax.Array:
        """SD3, eq. 20; u and f(u) change to 1 - u and 1 - f(u) together, so that the direction of time is free."""
        return 1 - u - self.mode_scale * (jnp.cos(math.pi / 2 * u) ** 2 - 1 + u)


def _cosmap(u: jax.Array) -> jax.Array:
    """SD3, eq. 21: 1 - 1 / (tan(pi u / 2) + 1), without the tangent's pole."""
    sin, cos = jnp.sin(math.pi / 2 * u), jnp.cos(math.pi / 2 * u)
    return sin / (sin + cos)


def shifted(t: Any, shift: float) -> Any:
    """Times t moved towards the noise: 1 - t becomes shift (1 - t) / (1 + (shift - 1)(1 - t)) (SD3, eq. 23)."""
    return t / (t + shift * (1 - t))
