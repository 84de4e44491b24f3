"""Samplers: from noise to x0 through every step of a process, the whole loop one lax.scan.

Randomness is a pure function of (key, sample index, step): sample 17 comes out the same in any batch, on any
number of devices. A run of samples `indices` with one seed:

    keys = sample_keys(jax.random.key(seed), indices)       # one key per sample
    noise = start_noise(keys, (H, W, C))
    x0 = sample_ddim(diffusion, denoise_fn, noise, keys)    # jit the whole, parameters as an argument

B samples, H height, W width, C channels, T steps of the process (order of use: the noisiest comes first).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.process import DenoiseFn

# Folded into a sample's key for its start noise; step s folds in s, which never gets there.
_START = np.uint32(0xFFFF_FFFF)


# ------------------------------------------------------------------------------------------- randomness


def sample_keys(key: jax.Array, indices: jax.Array | Sequence[int] | np.ndarray) -> jax.Array:
    """One key per sample, (B,): `key` (of the seed) folded with the sample's index (B,)."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(_typed(key), jnp.asarray(indices))


def start_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The standard normal start (B, *shape), float32, independent of the noise of every step."""
    return _normal(_typed(keys), _START, shape)


def step_noise_at(keys: jax.Array, step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """The standard normal noise (B, *shape), float32, that a sampler draws at its step-th step (from 0)."""
    return _normal(_typed(keys), step, shape)


def _normal(keys: jax.Array, data: jax.Array | int | np.uint32, shape: tuple[int, ...]) -> jax.Array:
    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, data), shape, jnp.float32)

    return jax.vmap(draw)(keys)


def _typed(key: jax.Array) -> jax.Array:
    """Typed keys of typed or raw uint32 ones."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def keys_for(key: jax.Array, batch: int) -> jax.Array:
    keys = _typed(key)
    if keys.ndim == 0:
        return sample_keys(keys, jnp.arange(batch))
    if keys.shape != (batch,):
        raise ValueError(
            f"key holds keys of shape {keys.shape}; expected one key, or one for each of {batch} samples"
        )
    return keys


# ------------------------------------------------------------------------------------------------ steps


def ddpm_step(
    diffusion: GaussianDiffusion,
    model_output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    clip_denoised: bool = False,
) -> jax.Array:
    """x_{t-1} by one ancestral step (arXiv 2006.11239, algorithm 2); no noise is added at t = 0.

    model_output: the network's output at (x_t, t), (B, H, W, C or 2C). t: step of the process, (B,).
    noise: standard normal, of x_t's shape.
    """
    p = diffusion.p_mean_variance(model_output, x_t, t, clip_denoised)
    add = jnp.asarray(t > 0, jnp.float32).reshape((-1,) + (1,) * (x_t.ndim - 1))
    return p.mean + add * jnp.exp(0.5 * p.log_variance) * noise


def ddim_step(
    diffusion: GaussianDiffusion,
    model_output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    noise: jax.Array | None = None,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> jax.Array:
    """x_{t-1} by one DDIM step (Song et al., arXiv 2010.02502, eq. 12 and 16); noise is unused when eta is 0.

    eta: 0 is deterministic, 1 has the variance of DDPM with fixed_small.
    """
    sigma, direction = ddim_tables(diffusion, eta)
    p = diffusion.p_mean_variance(model_output, x_t, t, clip_denoised)
    eps = diffusion.predict_eps(p.pred_xstart, x_t, t)
    signal = diffusion.at(np.sqrt(diffusion.alphas_cumprod_prev), t, x_t)
    mean = signal * p.pred_xstart + diffusion.at(direction, t, x_t) * eps
    if eta == 0:
        return mean
    if noise is None:
        raise ValueError(f"noise is missing; expected an array of shape {x_t.shape} when eta is {eta}")
    return mean + diffusion.at(sigma, t, x_t) * noise


def ddim_tables(diffusion: GaussianDiffusion, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation of the noise and weight of the predicted noise at each step, (T,) float64.

    Raises ValueError for an eta below 0, or with which a step would add more noise than it leaves.
    """
    ac, prev = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    sigma = eta * np.sqrt((1 - prev) / (1 - ac) * (1 - ac / prev))
    left = 1 - prev - sigma**2
    if not (eta >= 0 and left.min() >= -1e-12):
        raise ValueError(
            f"eta is {eta}; expected 0 or more, and no step to add more noise than it leaves (1 always fits)"
        )
    return sigma, np.sqrt(np.maximum(left, 0))


# ------------------------------------------------------------------------------------------------ loops


def sample_ddpm(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    noise: jax.Array,
    key: jax.Array | None = None,
    step_noise: jax.Array | None = None,
    return_trajectory: bool = False,
    clip_denoised: bool = False,
) -> jax.Array:
    """x0 (B, H, W, C) by ancestral sampling over all steps of the process, from `noise` (B, H, W, C).

    denoise_fn(x, t): the network, given original timesteps (B,).
    key: one key, folded with 0..B-1, or one key per sample (see `sample_keys`), typed or raw.
    step_noise: (T, B, H, W, C), replaces the drawn noise, in order of use; no key is needed then.
    return_trajectory: return the state after every step, (T, B, H, W, C), instead.
    clip_denoised: clip every predicted x0 to [-1, 1].

    Raises ValueError when shapes do not fit or the noise has no source.
    """

    def step(output: jax.Array, x: jax.Array, t: jax.Array, eps: jax.Array | None) -> jax.Array:
        assert eps is not None  # _scan was told to draw
        return ddpm_step(diffusion, output, x, t, eps, clip_denoised)

    return _scan(diffusion, denoise_fn, step, noise, key, step_noise, return_trajectory, stochastic=True)


def sample_ddim(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    noise: jax.Array,
    key: jax.Array | None = None,
    step_noise: jax.Array | None = None,
    return_trajectory: bool = False,
    eta: float = 0.0,
    clip_denoised: bool = False,
) -> jax.Array:
    """x0 (B, H, W, C) by DDIM; the arguments of `sample_ddpm`, and `eta`, a number known at trace time.

    With eta = 0 (the default) no noise is drawn and neither key nor step_noise is used.
    """

    def step(output: jax.Array, x: jax.Array, t: jax.Array, eps: jax.Array | None) -> jax.Array:
        return ddim_step(diffusion, output, x, t, eps, eta, clip_denoised)

    return _scan(diffusion, denoise_fn, step, noise, key, step_noise, return_trajectory, stochastic=eta != 0)


def _scan(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    step: Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array],
    noise: jax.Array,
    key: jax.Array | None,
    step_noise: jax.Array | None,
    return_trajectory: bool,
    stochastic: bool,
) -> jax.Array:
    """`step` from t = T - 1 down to 0, with recorded, drawn or no noise."""
    batch, steps = noise.shape[0], diffusion.num_timesteps
    if step_noise is not None and step_noise.shape != (steps, *noise.shape):
        raise ValueError(f"step_noise has shape {step_noise.shape}; expected {(steps, *noise.shape)}")
    draw = stochastic and step_noise is None
    if draw and key is None:
        raise ValueError(
            "key and step_noise are missing; expected one of them, the sampler needs noise at every step"
        )
    keys = keys_for(key, batch) if draw and key is not None else None

    def body(x: jax.Array, inputs: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        s, eps = inputs
        t = jnp.full((batch,), steps - 1 - s, jnp.int32)
        if keys is not None:
            eps = step_noise_at(keys, s, x.shape[1:])
        x = step(diffusion.denoise(denoise_fn, x, t), x, t, eps)
        return x, x if return_trajectory else None

    recorded = step_noise if stochastic else None
    start = jnp.asarray(noise, jnp.float32)
    x0, trajectory = jax.lax.scan(body, start, (jnp.arange(steps, dtype=jnp.int32), recorded))
    return x0 if trajectory is None else trajectory
