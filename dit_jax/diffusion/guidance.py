"""Guidance: wraps a conditional network into a denoise_fn(x, t) whose output is drawn away from a weaker one.

With w the scale at a sample's time:

    weaker + w (stronger - weaker)

Classifier-free guidance (arXiv 2207.12598, eq. 6): the weaker one is the network without its condition. Autoguidance
(Karras et al., arXiv 2406.02507, eq. 4): it is another network, smaller or trained for less long. Skip-layer guidance
(of Stable Diffusion 3.5 medium) adds s (stronger - skipping), the last being the network without a few of its layers.

B batch, H height, W width, C channels of the latent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import DenoiseFn, Network

Array = jax.Array
Schedule = Callable[[Array], Array]
"""Times as the network is shown them (B,) -> the share (B,) of scale - 1 that holds there."""


# Shares of scale - 1 by noise level, 1 noise to 0 data, whose mean over time is 1: weak at first, strong towards the
# data (Wang et al., arXiv 2404.13040).
SCHEDULES: dict[str, Schedule | None] = {
    "constant": None,
    "linear": lambda level: 2 * (1 - level),
    "cosine": lambda level: 1 + jnp.cos(jnp.pi * level),
}


@dataclass(frozen=True)
class Skipping:
    """Skip-layer guidance: the network without a few layers, the scale, and the times, lowest and highest as the
    network is shown them, that have it."""

    network: Network
    scale: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Guided:
    """A denoise_fn with guidance. Where its interval is known not to hold, a loop may call `unguided` instead, which
    may have guidance of another interval."""

    guided: DenoiseFn
    unguided: DenoiseFn
    interval: tuple[float, float] | None

    def __call__(self, x: Array, t: Array) -> Array:
        """The network's output, guided at the times of the interval."""
        return self.guided(x, t)

    def holds(self, shown: np.ndarray) -> np.ndarray:
        """Whether there is guidance at these times, (S,) as the network is shown them."""
        if self.interval is None:
            return np.ones(shown.shape, bool)
        limits = np.array(self.interval)
        if not np.issubdtype(shown.dtype, np.integer):  # as the loop compares
            shown, limits = shown.astype(np.float32), limits.astype(np.float32)
        return (shown >= limits[0]) & (shown <= limits[1])


def classifier_free_guidance(
    denoise_fn: Network,
    y: Any,
    null_label: Any,
    scale: float | Array,
    channels: Literal["all"] | int = "all",
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    schedule: Schedule | None = None,
    skipping: Skipping | None = None,
) -> DenoiseFn:
    """Guidance by the network without its condition, in one forward pass over a batch of 2B.

    y: the condition: labels (B,), or any tree of arrays whose first axis is the batch. null_label: what stands in its
        place for "none", num_classes in a DiT; a tree has a null for each array, which broadcasts to a sample's part.
    scale: a number, or one per sample (B,). The number 1.0 costs no second half.
    channels: how many of the C predicted channels are guided, "all" or the first few (3 in the published DiT
        sampler). Channels beyond them, and the variance's, are those of the conditional half.
    interval: (lowest, highest) original timestep with guidance, both included; the scale is 1 elsewhere
        (Kynkäänniemi et al., arXiv 2404.07724).
    rescale: share, 0 to 1, of an output with the conditional one's standard deviation over pixels and guided
        channels: large scales otherwise raise contrast (Lin et al., arXiv 2305.08891, section 3.4).
    schedule: the scale over time; None: constant.
    skipping: skip-layer guidance beside it.

    Raises ValueError when shapes or numbers do not fit.
    """
    how = _checked(scale, channels, interval, rescale, schedule)
    y, count = _condition(y, scale)

    def conditional(x: Array, t: Array) -> Array:
        return denoise_fn(x, t, y)

    def halves(x: Array, t: Array) -> tuple[Array, Array]:
        if x.shape[0] != count:
            raise ValueError(f"y has {count} labels; expected one for each of {x.shape[0]} samples")
        # A sample's two halves are neighbours: a batch split over devices then stays where it is.
        conditions = jax.tree.map(_with_null, y, null_label)
        both = denoise_fn(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2, axis=0), conditions)
        pairs = both.reshape(-1, 2, *both.shape[1:])
        return pairs[:, 0], pairs[:, 1]

    return how.applied(conditional, halves, _skipping(skipping, y))


def autoguidance(
    denoise_fn: Network,
    weaker: Network,
    y: Any,
    scale: float | Array,
    channels: Literal["all"] | int = "all",
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    schedule: Schedule | None = None,
    skipping: Skipping | None = None,
) -> DenoiseFn:
    """Guidance by a weaker network of the same condition; arguments as of `classifier_free_guidance`."""
    how = _checked(scale, channels, interval, rescale, schedule)
    y, _ = _condition(y, scale)

    def stronger(x: Array, t: Array) -> Array:
        return denoise_fn(x, t, y)

    both = lambda x, t: (stronger(x, t), weaker(x, t, y))  # noqa: E731
    return how.applied(stronger, both, _skipping(skipping, y))


def _skipping(skipping: Skipping | None, y: Any) -> Skips | None:
    """The same of a network that is told its condition."""
    if skipping is None:
        return None
    return (lambda x, t: skipping.network(x, t, y)), skipping.scale, skipping.interval


Skips = tuple[DenoiseFn, float, tuple[float, float]]


@dataclass(frozen=True)
class _How:
    """What both kinds of guidance are told."""

    scale: Any
    channels: Literal["all"] | int
    interval: tuple[float, float] | None
    rescale: float
    schedule: Schedule | None

    def applied(
        self,
        unguided: DenoiseFn,
        both: Callable[[Array, Array], tuple[Array, Array]],
        skips: Skips | None = None,
    ) -> DenoiseFn:
        """A denoise_fn from that of the stronger output, that of (stronger, weaker), and skip-layer guidance."""
        if isinstance(self.scale, int | float | np.number) and self.scale == 1:
            plain, pair = unguided, lambda x, t: (unguided(x, t),) * 2
        else:
            plain, pair = Guided(functools.partial(self._guided, both, None), unguided, self.interval), both
        if skips is None:
            return plain
        return Guided(functools.partial(self._guided, pair, skips), plain, skips[2])

    def _guided(
        self, both: Callable[[Array, Array], tuple[Array, Array]], skips: Skips | None, x: Array, t: Array
    ) -> Array:
        count = x.shape[-1] if self.channels == "all" else self.channels
        if count > x.shape[-1]:
            raise ValueError(f"channels is {count}; expected at most the {x.shape[-1]} channels of x")
        stronger, weaker = both(x, t)
        weight = _per_sample(self._weight(t), x)
        part = weaker[..., :count] + weight * (stronger[..., :count] - weaker[..., :count])
        if skips is not None:
            network, scale, (low, high) = skips
            share = _per_sample(jnp.where((t >= low) & (t <= high), scale, 0.0), x)
            part = part + share * (stronger[..., :count] - network(x, t)[..., :count])
        if self.rescale:
            part = part * (1 - self.rescale + self.rescale * _spread(stronger[..., :count]) / _spread(part))
        return jnp.concatenate([part, stronger[..., count:].astype(part.dtype)], axis=-1)

    def _weight(self, t: Array) -> Array:
        """The scale of each sample at its timestep, (B,) float32."""
        weight = jnp.broadcast_to(jnp.asarray(self.scale, jnp.float32), t.shape)
        if self.schedule is not None:
            weight = 1 + (weight - 1) * self.schedule(t)
        if self.interval is None:
            return weight
        return jnp.where((t >= self.interval[0]) & (t <= self.interval[1]), weight, 1.0)


def _checked(scale: Any, channels: Any, interval: Any, rescale: float, schedule: Any) -> _How:
    if channels != "all" and (not isinstance(channels, int) or channels < 1):
        raise ValueError(f"channels is {channels!r}; expected 'all' or a number of at least 1")
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval is {interval}; expected (lowest, highest) timestep")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale}; expected 0 to 1")
    return _How(scale, channels, interval, rescale, schedule)


def _condition(y: Any, scale: Any) -> tuple[Any, int]:
    """The condition as arrays, and how many samples it is of."""
    y = jax.tree.map(jnp.asarray, y)
    shapes = [leaf.shape for leaf in jax.tree.leaves(y)]
    batch = {shape[:1] for shape in shapes}
    if batch != {shapes[0][:1]} or () in batch or np.shape(scale) not in ((), *batch):
        shown = ", ".join(map(str, shapes))
        raise ValueError(f"y has shape {shown} and scale {np.shape(scale)}; expected (B,), and () or (B,)")
    return y, shapes[0][0]


def _per_sample(values: Array, like: Array) -> Array:
    """Values (B,), shaped to multiply an array (B, ...)."""
    return values.reshape((-1,) + (1,) * (like.ndim - 1))


def _spread(x: Array) -> Array:
    """Standard deviation of each sample, (B, 1, 1, 1)."""
    return jnp.std(x, axis=tuple(range(1, x.ndim)), keepdims=True)


def _with_null(y: Array, null: Any) -> Array:
    """An array of a condition (B, ...), each sample's followed by the null: (2B, ...)."""
    nulls = jnp.broadcast_to(jnp.asarray(null, y.dtype), y.shape)
    return jnp.stack([y, nulls], axis=1).reshape(-1, *y.shape[1:])
