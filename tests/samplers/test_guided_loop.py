"""Where guidance holds only in an interval, the loop pays for it only there, and draws the same."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import FlowMatching, GaussianDiffusion
from dit_jax.diffusion.guidance import Skipping, classifier_free_guidance
from dit_jax.samplers.table import Choice, sample

B, NULL = 4, 9


@pytest.fixture
def counted():
    """A smooth network, and the numbers of evaluations by size of batch."""
    calls = collections.Counter()

    def network(x, t, y):
        jax.debug.callback(lambda: calls.update([x.shape[0]]))
        pull = jnp.cos(y.astype(jnp.float32) + jnp.asarray(t, jnp.float32))[:, None, None, None]
        return jnp.tanh(0.5 * x + pull)

    return network, calls


PROCESSES = {
    "gaussian": (GaussianDiffusion.create(learn_sigma=False), (200, 700)),
    "flow": (FlowMatching.create(), (0.3, 0.8)),
    "flow, to noise": (FlowMatching.create(time_direction="to_noise", time_scale=1000.0), (300.0, 800.0)),
}


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "unipc_3", "euler_maruyama"])
@pytest.mark.parametrize("process", PROCESSES)
def test_steps_outside_the_interval_cost_half(counted, process, sampler):
    network, calls = counted
    process, interval = PROCESSES[process]
    noise, y = jax.random.normal(jax.random.key(0), (B, 4, 4, 2)), jnp.arange(B)
    guided = classifier_free_guidance(network, y, NULL, 4.0, interval=interval)

    def draw(denoise_fn):
        calls.clear()
        run = jax.jit(
            lambda x: sample(process, denoise_fn, x, jax.random.key(1), choice=Choice(sampler, 20)).x
        )
        x = run(noise)
        jax.effects_barrier()
        return x, dict(calls)

    found, cheap = draw(guided)
    expected, dear = draw(lambda x, t: guided(x, t))  # the loop does not see what this is
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    assert set(dear) == {2 * B} and set(cheap) == {B, 2 * B}
    assert sum(cheap.values()) == dear[2 * B]
    assert 0.4 <= cheap[2 * B] / dear[2 * B] <= 0.65  # half of the times
    without, _ = draw(lambda x, t: network(x, t, y))
    assert float(jnp.abs(found - without).max()) > 1e-2


@pytest.mark.parametrize("interval", [None, (0.0, 0.5)])
def test_skip_layer_guidance_costs_a_third_pass_where_it_holds(counted, interval):
    """Of 20 steps from 0 to 1 there are 5 at 0.2 to 0.4; beside guidance in all steps or in the first half."""
    network, calls = counted
    noise, y = jax.random.normal(jax.random.key(0), (B, 4, 4, 2)), jnp.arange(B)
    asked = collections.Counter()

    def other(x, t, y):
        jax.debug.callback(lambda: asked.update([x.shape[0]]))
        return jnp.sin(x)

    skipping = Skipping(other, 2.5, (0.18, 0.42))
    guided = classifier_free_guidance(network, y, NULL, 4.0, interval=interval, skipping=skipping)
    plain = classifier_free_guidance(network, y, NULL, 4.0, interval=interval)

    def by_hand(x, t):
        away = 2.5 * (network(x, t, y) - other(x, t, y))
        return plain(x, t) + jnp.where((t > 0.18) & (t < 0.42), 1.0, 0.0)[:, None, None, None] * away

    def draw(denoise_fn):
        calls.clear(), asked.clear()
        x = jax.jit(
            lambda x: sample(FlowMatching.create(), denoise_fn, x, choice=Choice("euler", 20)).x
        )(noise)  # fmt: skip
        jax.effects_barrier()
        return x, dict(calls), dict(asked)

    found, of_network, of_other = draw(guided)
    assert of_other == {B: 5} and of_network == ({2 * B: 20} if interval is None else {2 * B: 11, B: 9})
    np.testing.assert_allclose(found, draw(by_hand)[0], rtol=2e-4, atol=2e-4)
    assert float(jnp.abs(found - draw(plain)[0]).max()) > 1e-2


def test_skip_layer_guidance_alone(counted):
    network, _ = counted
    x, t, y = jnp.ones((B, 4, 4, 2)), jnp.full(B, 0.3), jnp.arange(B)
    skipping = Skipping(lambda x, t, y: jnp.sin(x), 2.0, (0.0, 1.0))
    found = classifier_free_guidance(network, y, NULL, 1.0, skipping=skipping)(x, t)
    np.testing.assert_allclose(found, 3 * network(x, t, y) - 2 * jnp.sin(x), rtol=1e-5)
