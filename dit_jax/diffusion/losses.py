"""Terms of the variational bound between Gaussians, per element, in nats.

Shapes broadcast; every argument is float32 and of one shape (B, H, W, C).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def mean_flat(x: jax.Array) -> jax.Array:
    """Mean over everything but the batch: (B, ...) -> (B,)."""
    return x.mean(axis=tuple(range(1, x.ndim)))


def normal_kl(mean1: jax.Array, logvar1: jax.Array, mean2: jax.Array, logvar2: jax.Array) -> jax.Array:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) of each element, in nats."""
    return 0.5 * (
        -1.0 + logvar2 - logvar1 + jnp.exp(logvar1 - logvar2) + jnp.square(mean1 - mean2) * jnp.exp(-logvar2)
    )


def discretized_gaussian_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Log probability, in nats, of each element's bin of width 2/255 under N(mean, exp(log_scale)^2).

    The bins are those of 8-bit values scaled to [-1, 1]; the outermost two are open (Ho et al., arXiv
    2006.11239, eq. 13). The normal CDF is the tanh approximation of the published code, and probabilities
    are floored at 1e-12.
    """
    inverse_scale = jnp.exp(-log_scale)
    cdf_upper = _approx_normal_cdf(inverse_scale * (x - mean + 1 / 255))
    cdf_lower = _approx_normal_cdf(inverse_scale * (x - mean - 1 / 255))
    probability = jnp.where(
        x < -0.999, cdf_upper, jnp.where(x > 0.999, 1.0 - cdf_lower, cdf_upper - cdf_lower)
    )
    return jnp.log(jnp.maximum(probability, 1e-12))


def _approx_normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
