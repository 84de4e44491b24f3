"""Classifier-free guidance against its formula on a network that shows what it was given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion.guidance import autoguidance, classifier_free_guidance

B, NULL = 3, 10
CHANNELS = jnp.arange(8.0)[None, None, None]  # C = 4, learned sigma: 8 outputs


@pytest.fixture
def network():
    """Output channel k is x's mean + t + k y; `calls` holds the batch of each forward pass."""
    calls = []

    def denoise(x, t, y):
        calls.append(x.shape[0])
        per_sample = x.mean(axis=(1, 2, 3)) + t
        label = y.astype(jnp.float32)[:, None, None, None] * CHANNELS
        return per_sample[:, None, None, None] + jnp.broadcast_to(label, (*x.shape[:3], 8))

    denoise.calls = calls
    return denoise


@pytest.fixture
def batch():
    return jax.random.normal(jax.random.key(0), (B, 2, 2, 4)), jnp.array([0, 500, 999]), jnp.array([1, 2, 3])


def channels_of(output, x, t):
    """The label's share of each output channel, (B, 8)."""
    return np.asarray(output - (x.mean(axis=(1, 2, 3)) + t)[:, None, None, None])[:, 0, 0]


@pytest.mark.parametrize(("channels", "count"), [("all", 4), (3, 3), (4, 4), (1, 1)])
def test_only_the_guided_channels_move(network, batch, channels, count):
    x, t, y = batch
    out = classifier_free_guidance(network, y, NULL, 4.0, channels)(x, t)
    assert network.calls == [2 * B]
    k, label = np.arange(8), np.asarray(y)[:, None]
    expected = np.where(k < count, k * (NULL + 4.0 * (label - NULL)), k * label)
    np.testing.assert_allclose(channels_of(out, x, t), expected, atol=1e-3)


def test_scale_per_sample_and_interval(network, batch):
    x, t, y = batch
    scale = jnp.array([2.0, 3.0, 4.0])
    out = classifier_free_guidance(network, y, NULL, scale, interval=(500, 900))(x, t)
    used = np.array([1.0, 3.0, 1.0])[:, None]  # t = 0 and 999 lie outside
    k, label = np.arange(8), np.asarray(y)[:, None]
    expected = np.where(k < 4, k * (NULL + used * (label - NULL)), k * label)
    np.testing.assert_allclose(channels_of(out, x, t), expected, atol=1e-3)


@pytest.mark.parametrize("scale", [1, 1.0, np.float32(1)])
def test_scale_one_needs_no_second_half(network, batch, scale):
    x, t, y = batch
    np.testing.assert_array_equal(classifier_free_guidance(network, y, NULL, scale)(x, t), network(x, t, y))
    assert network.calls == [B, B]


def test_traced_scale(network, batch):
    x, t, y = batch
    found = jax.jit(lambda s: classifier_free_guidance(network, y, NULL, s)(x, t))(2.5)
    np.testing.assert_allclose(found, classifier_free_guidance(network, y, NULL, 2.5)(x, t), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 5}, "channels is 5; expected at most the 4"),
        ({"channels": 0}, "channels is 0"),
        ({"channels": "three"}, "channels is 'three'"),
        ({"scale": jnp.ones(2)}, r"scale \(2,\)"),
        ({"interval": (900, 100)}, "interval is"),
        ({"y": jnp.array([1, 2])}, "y has 2 labels; expected one for each of 3"),
    ],
)
def test_errors(network, batch, options, message):
    x, t, y = batch
    options = {"y": y, "scale": 2.0, **options}
    with pytest.raises(ValueError, match=message):
        classifier_free_guidance(network, null_label=NULL, **options)(x, t)


def test_rescaling_keeps_the_conditional_standard_deviation(network, batch):
    x, t, y = batch
    found = {
        phi: classifier_free_guidance(network, y, NULL, 5.0, rescale=phi)(x, t) for phi in (0.0, 0.5, 1.0)
    }
    spread = {phi: np.asarray(out[..., :4]).std(axis=(1, 2, 3)) for phi, out in found.items()}
    conditional = np.asarray(network(x, t, y)[..., :4]).std(axis=(1, 2, 3))
    assert np.all(spread[0.0] > 2 * conditional)
    np.testing.assert_allclose(spread[1.0], conditional, rtol=1e-5)
    np.testing.assert_allclose(found[0.5], (found[0.0] + found[1.0]) / 2, rtol=1e-5)


def test_a_schedule_is_the_scale_over_time(network, batch):
    x, t, y = batch
    out = classifier_free_guidance(network, y, NULL, 3.0, schedule=lambda t: t / 999)(x, t)
    used = 1 + 2 * np.asarray(t)[:, None] / 999
    k, label = np.arange(8), np.asarray(y)[:, None]
    expected = np.where(k < 4, k * (NULL + used * (label - NULL)), k * label)
    np.testing.assert_allclose(channels_of(out, x, t), expected, atol=1e-3)


def test_autoguidance_draws_away_from_the_weaker_network(network, batch):
    x, t, y = batch

    def weaker(x, t, y):
        return 0.5 * network(x, t, y)

    out = autoguidance(network, weaker, y, 3.0, channels=2)(x, t)
    assert network.calls == [B, B]
    strong = np.asarray(network(x, t, y))
    np.testing.assert_allclose(out[..., :2], 2 * strong[..., :2], rtol=1e-5)  # 0.5 + 3 (1 - 0.5)
    np.testing.assert_array_equal(out[..., 2:], strong[..., 2:])
    assert autoguidance(network, weaker, y, 1.0)(x, t).shape == strong.shape and network.calls[-1] == B


def test_a_rescaling_that_is_no_share_is_refused(network, batch):
    with pytest.raises(ValueError, match=r"rescale is 1\.5; expected 0 to 1"):
        classifier_free_guidance(network, batch[2], NULL, 2.0, rescale=1.5)
