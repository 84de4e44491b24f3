"""What training and sampling ask of a process between data and noise, whichever it is.

Every process noises a latent as x_t = alpha_t x0 + sigma_t eps. The kinds differ in what a time is (a step of a
table, a number in [0, 1]), in its direction, in the levels alpha and sigma, and in what the network predicts.

B batch, H height, W width, C channels of the latent. x is (B, H, W, C) float32; t is (B,), int32 steps or float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax

from dit_jax.diffusion.predictions import Point, Prediction

Array = jax.Array

DenoiseFn = Callable[[Array, Array], Array]
"""(x_t (B, H, W, C), shown time (B,)) -> the network's output (B, H, W, C or 2C)."""

Network = Callable[[Array, Array, Any], Array]
"""(x_t (B, H, W, C), shown time (B,), condition) -> the network's output (B, H, W, C or 2C)."""


class Process(Protocol):
    """A process; `GaussianDiffusion` and `FlowMatching` are the kinds there are."""

    @property
    def predicts(self) -> Prediction:
        """What the network's first C channels are, in the names of `predictions`, which converts between them."""
        ...

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The terms that the log shows, "loss" first; one that `training_losses` does not give counts as 0."""
        ...

    def training_times(self, key: Array, n: int) -> Array:
        """Times of n training examples, (n,)."""
        ...

    def shown_time(self, t: Array) -> Array:
        """What the network is shown at time t, (B,)."""
        ...

    def noise_level(self, t: Array) -> Array:
        """How much of x_t is noise, (B,) float32 in [0, 1], growing with sigma / alpha: the log sorts by it."""
        ...

    def shown_noise_level(self, shown: Array) -> Array:
        """`noise_level` where the network is shown this, (B,), which may lie between two steps of a table."""
        ...

    def levels(self, t: Array, like: Array) -> Point:
        """Signal and noise at times t and their derivatives along the path, float32, shaped to multiply `like`."""
        ...

    def q_sample(self, x0: Array, t: Array, noise: Array, /) -> Array:
        """x_t of clean latents and standard normal noise."""
        ...

    def predict(self, denoise_fn: DenoiseFn, x: Array, t: Array) -> Array:
        """The network's prediction at x and t, (B, H, W, C) float32: what `predicts` says."""
        ...

    def training_losses(
        self, denoise_fn: DenoiseFn, x0: Array, t: Array, noise: Array, /
    ) -> dict[str, Array]:
        """Per-example losses, each (B,): "loss", which is trained on, and what it is made of."""
        ...

    def losses(
        self, network: Network, x0: Array, t: Array, noise: Array, condition: Any, /
    ) -> dict[str, Array]:
        """`training_losses` of a network that is still open in its condition.

        A process that differentiates the network by x or t has its own.
        """
        return self.training_losses(lambda x, shown: network(x, shown, condition), x0, t, noise)
