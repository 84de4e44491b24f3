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

    That CDF is a sigmoid of a polynomial, as 0.5 (1 + tanh(u / 2)) = sigmoid(u). With u and l of a bin's two
    ends, sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)): nothing cancels in its logarithm,
    where the difference of two CDFs near 1 keeps few digits in float32.
    """
    # The limits are far beyond the floor; without them the gradients of what is floored would not be finite.
    inverse_scale = jnp.exp(-jnp.clip(log_scale, -20.0, 60.0))
    centre = jnp.clip(inverse_scale * (x - mean), -1e9, 1e9)
    half = inverse_scale / 255
    upper, lower = _sigmoid_argument(centre + half), _sigmoid_argument(centre - half)
    # upper - lower, by the polynomial's own difference.
    gap = 2 * _SLOPE * half * (1 + _CUBIC * (3 * centre**2 + half**2))
    below, above = jax.nn.log_sigmoid(upper), jax.nn.log_sigmoid(-lower)
    log_probability = jnp.where(
        x < -0.999, below, jnp.where(x > 0.999, above, below + above + jnp.log(-jnp.expm1(-gap)))
    )
    return jnp.maximum(log_probability, math.log(1e-12))


_CUBIC = 0.044715
_SLOPE = 2 * math.sqrt(2 / math.pi)


def _sigmoid_argument(z: jax.Array) -> jax.Array:
    """u of the approximate normal CDF sigmoid(u) at z."""
    return _SLOPE * (z + _CUBIC * z**3)
