"""Randomness of sampling: a pure function of (key, sample index, step).

Sample 17 comes out the same in any batch, on any number of devices. A run of samples `indices` with one seed:

    keys = sample_keys(jax.random.key(seed), indices)       # one key per sample
    noise = start_noise(keys, (H, W, C))
    x0 = sample_ddim(diffusion, denoise_fn, noise, keys)    # jit the whole, parameters as an argument

B samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Folded into a sample's key for its start noise; step s folds in s, which never gets there.
_START = np.uint32(0xFFFF_FFFF)
_CHOICE = np.uint32(0xFFFF_FFFE)  # and for what it is of


def sample_keys(key: jax.Array, indices: jax.Array | Sequence[int] | np.ndarray) -> jax.Array:
    """One key per sample, (B,): `key` (of the seed) folded with the sample's index (B,)."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(_typed(key), jnp.asarray(indices))


def start_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The standard normal start (B, *shape), float32, independent of the noise of every step."""
    return _normal(_typed(keys), _START, shape)


def choices(keys: jax.Array, among: int) -> jax.Array:
    """A number (B,) from 0 to among - 1 for each sample, independent of its noise: one of so many labels, say."""

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, _CHOICE), (), 0, among)

    return jax.vmap(draw)(_typed(keys))


def step_noise_at(keys: jax.Array, step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """The standard normal noise (B, *shape), float32, that a sampler draws at its step-th step (from 0)."""
    return _normal(_typed(keys), step, shape)


def keys_for(key: jax.Array, batch: int) -> jax.Array:
    """Keys (batch,) of one key, folded with 0..batch-1, or of one per sample; ValueError for another number."""
    keys = _typed(key)
    if keys.ndim == 0:
        return sample_keys(keys, jnp.arange(batch))
    if keys.shape != (batch,):
        raise ValueError(
            f"key holds keys of shape {keys.shape}; expected one key, or one for each of {batch} samples"
        )
    return keys


def _normal(keys: jax.Array, data: jax.Array | int | np.uint32, shape: tuple[int, ...]) -> jax.Array:
    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, data), shape, jnp.float32)

    return jax.vmap(draw)(keys)


def _typed(key: jax.Array) -> jax.Array:
    """Typed keys of typed or raw uint32 ones."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
