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
    y: Any,
    null_label: Any,
    scale: float | jax.Array,
    channels: Literal["all"] | int = "all",
    interval: tuple[float, float] | None = None,
) -> DenoiseFn:
    """null + scale * (conditional - null), one forward pass over a batch of 2B (arXiv 2207.12598, eq. 6).

    y: the condition: labels (B,), or any tree of arrays whose first axis is the batch. null_label: what stands in its
        place for "none", num_classes in a DiT; a tree has a null for each array, which broadcasts to a sample's part.
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
    y = jax.tree.map(jnp.asarray, y)
    shapes = [leaf.shape for leaf in jax.tree.leaves(y)]
    batch = {shape[:1] for shape in shapes}
    if batch != {shapes[0][:1]} or () in batch or np.shape(scale) not in ((), *batch):
        shown = ", ".join(map(str, shapes))
        raise ValueError(f"y has shape {shown} and scale {np.shape(scale)}; expected (B,), and () or (B,)")
    count_y = shapes[0][0]
    if isinstance(scale, int | float | np.number) and scale == 1:
        return lambda x, t: denoise_fn(x, t, y)

    def guided(x: jax.Array, t: jax.Array) -> jax.Array:
        if x.shape[0] != count_y:
            raise ValueError(f"y has {count_y} labels; expected one for each of {x.shape[0]} samples")
        count = x.shape[-1] if channels == "all" else channels
        if count > x.shape[-1]:
            raise ValueError(f"channels is {count}; expected at most the {x.shape[-1]} channels of x")
        # A sample's two halves are neighbours: a batch split over devices then stays where it is.
        conditions = jax.tree.map(_with_null, y, null_label)
        both = denoise_fn(
            jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2, axis=0), conditions
        )  # (2B, H, W, C or 2C)
        pairs = both.reshape(-1, 2, *both.shape[1:])
        conditional, null = pairs[:, 0], pairs[:, 1]
        weight = _weight(scale, interval, t).reshape((-1,) + (1,) * (x.ndim - 1))
        guided_part = null[..., :count] + weight * (conditional[..., :count] - null[..., :count])
        return jnp.concatenate([guided_part, conditional[..., count:].astype(guided_part.dtype)], axis=-1)

    return guided


def _with_null(y: jax.Array, null: Any) -> jax.Array:
    """An array of a condition (B, ...), each sample's followed by the null: (2B, ...)."""
    nulls = jnp.broadcast_to(jnp.asarray(null, y.dtype), y.shape)
    return jnp.stack([y, nulls], axis=1).reshape(-1, *y.shape[1:])


def _weight(scale: Any, interval: tuple[float, float] | None, t: jax.Array) -> jax.Array:
    """The scale of each sample at its timestep, (B,) float32."""
    weight = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), t.shape)
    if interval is None:
        return weight
    return jnp.where((t >= interval[0]) & (t <= interval[1]), weight, 1.0)
