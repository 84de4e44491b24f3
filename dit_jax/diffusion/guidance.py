"""Guidance: wraps a class-conditional network into a denoise_fn(x, t).

B batch, H height, W width, C channels of the latent.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import DenoiseFn, Network


def classifier_free_guidance(
    denoise_fn: Network,
    y: jax.Array,
    null_label: int,
    scale: float | jax.Array,
    channels: Literal["all"] | int = "all",
    interval: tuple[float, float] | None = None,
) -> DenoiseFn:
    """null + scale * (conditional - null), one forward pass over a batch of 2B (arXiv 2207.12598, eq. 6).

    y: labels, (B,). null_label: the label that stands for "no class", num_classes in a DiT.
    scale: a number, or one per sample (B,). The number 1.0 costs no second half.
    channels: how many of the C predicted channels are guided, "all" or the first few (3 in the published DiT
        sampler). Channels beyond them, and the variance's, are those of the conditional half.
    interval: (lowest, highest) original timestep with guidance, both included; the scale is 1 elsewhere
        (Kynkäänniemi et al., arXiv 2404.07724).

    Raises ValueError when shapes or numbers do not fit.
    """
    if channels != "all" and (not isinstance(channels, int) or channels < 1):
        raise ValueError(f"channels is {channels!r}; expected 'all' or a number of at least 1")
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval is {interval}; expected (lowest, highest) timestep")
    y = jnp.asarray(y)
    if y.ndim != 1 or np.shape(scale) not in ((), y.shape):
        raise ValueError(f"y has shape {y.shape} and scale {np.shape(scale)}; expected (B,), and () or (B,)")
    if isinstance(scale, int | float | np.number) and scale == 1:
        return lambda x, t: denoise_fn(x, t, y)

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        if x.shape[0] != y.shape[0]:
            raise ValueError(f"y has {y.shape[0]} labels; expected one for each of {x.shape[0]} samples")
        count = x.shape[-1] if channels == "all" else channels
        if count > x.shape[-1]:
            raise ValueError(f"channels is {count}; expected at most the {x.shape[-1]} channels of x")
        # A sample's two halves are neighbours: a batch split over devices then stays where it is.
        labels = jnp.stack([y, jnp.full_like(y, null_label)], axis=1).reshape(-1)
        both = denoise_fn(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2, axis=0), labels)  # (2B, H, W, C or 2C)
        pairs = both.reshape(-1, 2, *both.shape[1:])
        conditional, null = pairs[:, 0], pairs[:, 1]
        weight = _weight(scale, interval, t).reshape((-1,) + (1,) * (x.ndim - 1))
        guided_part = null[..., :count] + weight * (conditional[..., :count] - null[..., :count])
        return jnp.concatenate([guided_part, conditional[..., count:].astype(guided_part.dtype)], axis=-1)

    return guided


def _weight(scale: Any, interval: tuple[float, float] | None, t: jax.Array) -> jax.Array:
    """The scale of each sample at its timestep, (B,) float32."""
    weight = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), t.shape)
    if interval is None:
        return weight
    return jnp.where((t >= interval[0]) & (t <= interval[1]), weight, 1.0)
