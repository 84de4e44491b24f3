"""Starts between two noises, from a latent, around a part of one, on networks whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import FlowMatching, GaussianDiffusion
from dit_jax.samplers.editing import Given, later_start, moments, spherical, way
from dit_jax.samplers.table import Choice

PROCESSES = {
    "gaussian": GaussianDiffusion.create(learn_sigma=False, schedule="squaredcos_cap_v2"),
    "flow": FlowMatching.create(),
}
SHAPE = (2, 4, 4, 3)


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


def perfect(process, x0):
    """The network of data that is x0 alone: what it predicts is exact."""

    def denoise(x, t):
        if isinstance(process, FlowMatching):
            left = jnp.maximum(1 - t, 1e-4)[:, None, None, None]
            return (x0 - x) / left
        ac = jnp.interp(
            t.astype(jnp.float32), jnp.arange(1000.0), jnp.asarray(process.alphas_cumprod, jnp.float32)
        )
        ac = ac[:, None, None, None]
        return (x - jnp.sqrt(ac) * x0) / jnp.sqrt(1 - ac)

    return denoise


@pytest.fixture
def latents():
    return (jax.random.normal(jax.random.key(seed), SHAPE) for seed in range(3))


def test_an_arc_between_noises_keeps_their_length():
    a, b = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    points = spherical(a, b, jnp.linspace(0, 1, 5))
    np.testing.assert_allclose(points[0], a, atol=1e-5)
    np.testing.assert_allclose(points[-1], b, atol=1e-5)
    lengths = np.linalg.norm(points.reshape(5, -1), axis=1)
    assert lengths.min() > 0.95 * min(np.linalg.norm(a), np.linalg.norm(b))  # a chord's middle: 0.71
    np.testing.assert_allclose(spherical(a, a, jnp.linspace(0, 1, 3)), jnp.stack([a] * 3), atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde"])
def test_a_way_begins_with_the_noise_and_ends_with_the_sample(process, latents, sampler):
    x0, noise, _ = latents
    found = way(process, perfect(process, x0), noise, jax.random.key(5), choice=Choice(sampler, 12))
    assert found.states.shape == found.x0.shape and found.states.shape[1:] == SHAPE
    np.testing.assert_array_equal(found.states[0], noise)
    np.testing.assert_array_equal(found.states[-1], found.x0[-1])
    np.testing.assert_allclose(found.states[-1], x0, atol=0.05)
    # The error of the first prediction is the noise's rounding over next to no signal.
    np.testing.assert_allclose(found.x0[2:], jnp.broadcast_to(x0, found.x0[2:].shape), atol=0.02)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "unipc_2"])
def test_a_given_latent_is_noised_up_to_where_the_steps_begin(process, latents, sampler):
    if isinstance(process, FlowMatching):
        sampler = sampler.replace("ddpm", "euler")  # which serves Gaussian processes alone
    x0, noise, given = latents
    denoise, key = perfect(process, x0), jax.random.key(5)

    def states(strength):
        choice = Choice(sampler, 10)
        return way(process, denoise, noise, key, choice=choice, given=Given(given), strength=strength).states

    few, most, all_of_them = states(0.3), states(0.9), states(1.0)
    assert (len(few), len(most), len(all_of_them)) == (4, 10, 11)
    np.testing.assert_array_equal(all_of_them[0], noise)
    assert float(jnp.abs(few[0] - given).mean()) < float(jnp.abs(most[0] - given).mean())
    near = float(jnp.vdot(few[0], given) / (jnp.linalg.norm(few[0]) * jnp.linalg.norm(given)))
    assert near > 0.7


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "dpmpp_2m_sde"])
def test_a_kept_part_is_that_of_the_given_latent(process, latents, sampler):
    x0, noise, given = latents
    keep = jnp.zeros((1, 4, 4, 1)).at[:, :2].set(1.0)
    found = way(
        process,
        perfect(process, x0),
        noise,
        jax.random.key(5),
        choice=Choice(sampler, 12),
        given=Given(given[:1], keep),
    )
    np.testing.assert_allclose(
        found.states[-1][:, :2], jnp.broadcast_to(given[:1, :2], (2, 2, 4, 3)), atol=2e-3
    )
    np.testing.assert_allclose(found.states[-1][:, 2:], x0[:, 2:], atol=0.05)
    middle = found.states[6]
    assert float(jnp.abs(middle[:, :2] - given[:1, :2]).mean()) > 0.05  # noised as the rest is


def test_an_adaptive_sampler_has_no_states_to_show(process, latents):
    x0, noise, _ = latents
    with pytest.raises(
        ValueError, match="sampler is 'dopri5', whose states are its own; expected one with steps"
    ):
        way(process, perfect(process, x0), noise, choice=Choice("dopri5", 10))


def test_steps_left_out_and_moments_shown():
    assert [later_start(10, s) for s in (1.0, 0.95, 0.5, 0.01)] == [0, 0, 5, 9]
    assert moments(50, 6).tolist() == [0, 10, 20, 30, 40, 50]
    assert moments(2, 10).tolist() == [0, 1, 2]
