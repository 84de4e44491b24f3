"""Likelihood and encoding on Gaussian data, where both are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import predictions
from dit_jax.diffusion.flow import FlowMatching
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.predictions import Point
from dit_jax.samplers.likelihood import bits_per_dimension, decode, encode, log_likelihood

PROCESSES = {
    "gaussian": GaussianDiffusion.create(learn_sigma=False, prediction="v"),
    "flow": FlowMatching.create(),
    "gvp": FlowMatching.create("gvp", "x0"),
}
MEAN, STD = 0.4, 0.5
SHAPE = (1, 2, 2)


def exact(process):
    """The network that is right for data from N(MEAN, STD^2) mixed over channels, which keeps it so."""
    gaussian = isinstance(process, GaussianDiffusion)

    def network(x, t):
        if gaussian:
            log = 0.5 * jnp.asarray(np.log(process.alphas_cumprod), jnp.float32)
            alpha = jnp.exp(jnp.interp(t.astype(jnp.float32), jnp.arange(1000.0), log))[:, None, None, None]
            p = Point(alpha, jnp.sqrt(1 - alpha**2), -jnp.sqrt(1 - alpha**2), alpha)
        else:
            p = process.levels(t, x)
        # Two channels correlate: with Q their axes, each is Gaussian of its own variance.
        turned = (x - p.alpha * MEAN) @ AXES
        variance = jnp.asarray(VARIANCES, jnp.float32).reshape(1, 1, 1, 2)
        gain = p.alpha * variance / (p.alpha**2 * variance + p.sigma**2)
        x0 = MEAN + (gain * turned) @ AXES.T
        variance = p.alpha**2 * variance + p.sigma**2
        eps = (p.sigma / variance * turned) @ AXES.T  # without a division by sigma
        return predictions.target(process.predicts, x0, eps, p)

    return network


COVARIANCE = STD**2 * np.array([[1.0, 0.6], [0.6, 0.8]])
VARIANCES, AXES = np.linalg.eigh(COVARIANCE)
X0 = MEAN + 0.6 * np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float32)


def truth(process, x):
    """log density of latents; a Gaussian process's timestep 0 holds a little noise."""
    covariance, mean = COVARIANCE, MEAN
    if isinstance(process, GaussianDiffusion):
        share = process.alphas_cumprod[0]
        covariance, mean = share * COVARIANCE + (1 - share) * np.eye(2), np.sqrt(share) * MEAN
    away = x.reshape(len(x), -1, 2) - mean
    squares = np.einsum("bni,ij,bnj->b", away, np.linalg.inv(covariance), away)
    pixels = away.shape[1]
    return -0.5 * squares - 0.5 * pixels * np.log((2 * np.pi) ** 2 * np.linalg.det(covariance))


@pytest.mark.parametrize("name", PROCESSES)
def test_exact_likelihood_is_the_closed_form(name):
    process = PROCESSES[name]
    found = jax.jit(lambda x: log_likelihood(process, exact(process), x, steps=200))(X0)
    # gvp predicts x0 and ends, as SiT does, at a margin of 1e-3; 200 steps of the Gaussian process leave 0.02.
    np.testing.assert_allclose(found, truth(process, X0), atol=0.01 if name == "flow" else 0.03)
    bits = bits_per_dimension(found, 4)
    np.testing.assert_allclose(bits, -np.asarray(found) / 4 / np.log(2), rtol=1e-6)


def test_probes_are_right_on_average():
    process = PROCESSES["flow"]
    x = np.repeat(X0[:1], 400, axis=0)
    found = jax.jit(lambda x, key: log_likelihood(process, exact(process), x, key, steps=50))(
        x, jax.random.key(0)
    )
    error = found.std() / np.sqrt(len(found))
    assert error > 1e-3  # the probes differ
    np.testing.assert_allclose(found.mean(), truth(process, X0[:1])[0], atol=4 * error + 0.01)


@pytest.mark.parametrize("name", PROCESSES)
def test_encode_is_the_way_back_of_decode(name):
    process = PROCESSES[name]
    noise = jax.jit(lambda x: encode(process, exact(process), x))(X0)
    away = (X0 - MEAN).reshape(5, 2, 2)
    # The ODE maps the data's Gaussian to the noise's along its axes.
    expected = (away @ AXES / np.sqrt(VARIANCES)) @ AXES.T
    np.testing.assert_allclose(noise.reshape(5, 2, 2), expected, atol=0.03)
    back = jax.jit(lambda x: decode(process, exact(process), x))(noise)
    np.testing.assert_allclose(back, X0, atol=3e-3)
