"""Flow matching against numbers recorded from SiT: model, path, target, losses; and its formulas' identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dit_jax.diffusion import predictions
from dit_jax.diffusion.flow import FlowMatching
from dit_jax.diffusion.paths import PATHS, point
from dit_jax.diffusion.times import TimeDistribution, shifted

CASES = [
    ("linear", "velocity", None),
    ("vp", "noise", "velocity"),
    ("gvp", "score", "likelihood"),
]


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)


def test_network(sit, sit_network):
    out = sit_network(nhwc(sit["x1"]), jnp.asarray(sit["u"]))[..., :4]
    close(out, nhwc(sit["model/out"]))


@pytest.mark.parametrize(("path", "prediction", "weight"), CASES)
def test_path_and_losses(sit, sit_network, path, prediction, weight):
    process = FlowMatching.create(path, prediction, weight)
    recorded = {
        k.split("/")[1]: v for k, v in sit.items() if k.startswith(f"{path}-{prediction}-{weight or 'none'}/")
    }
    low, high = process.training_interval()
    t = jnp.asarray(sit["u"] * (high - low) + low)
    close(t, recorded["t"])
    x1, x0 = nhwc(sit["x1"]), nhwc(sit["x0"])
    close(process.q_sample(x1, t, x0), nhwc(recorded["xt"]))
    close(process.target_velocity(x1, t, x0), nhwc(recorded["ut"]))
    close(process.training_losses(sit_network, x1, t, x0)["loss"], recorded["loss"])


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_are_those_of_the_levels(path):
    t, h = np.linspace(0.05, 0.95, 19), 1e-6
    before, after, p = point(path, t - h), point(path, t + h), point(path, t)
    np.testing.assert_allclose(p.d_alpha, (after.alpha - before.alpha) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(p.d_sigma, (after.sigma - before.sigma) / (2 * h), rtol=1e-6)
    if path != "linear":
        np.testing.assert_allclose(p.alpha**2 + p.sigma**2, 1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", predictions.PREDICTIONS)
def test_every_prediction_gives_every_other(path, kind):
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 5, 3))
    p = point(path, np.linspace(0.1, 0.9, 5)[:, None])
    true = {
        "x0": x0,
        "noise": eps,
        "score": -eps / p.sigma,
        "velocity": p.d_alpha * x0 + p.d_sigma * eps,
    }
    x = p.alpha * x0 + p.sigma * eps
    for name, expected in true.items():
        found = getattr(predictions, f"to_{name}")(kind, true[kind], x, p)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["noise", "score", "x0"])
def test_the_velocity_weight_is_the_error_of_the_velocity(path, kind):
    rng = np.random.default_rng(1)
    x1, x0, wrong = jnp.asarray(rng.standard_normal((3, 4, 2, 2, 3)), jnp.float32)
    t = jnp.asarray([0.2, 0.4, 0.6, 0.8])
    process = FlowMatching.create(path, kind, "velocity")
    loss = process.training_losses(lambda x, t: wrong, x1, t, x0)["loss"]
    p = process.levels(t, x1)
    x_t = process.q_sample(x1, t, x0)
    error = process.velocity(wrong, x_t, p) - process.target_velocity(x1, t, x0)
    np.testing.assert_allclose(loss, jnp.mean(error**2, axis=(1, 2, 3)), rtol=2e-4)


def test_the_network_may_count_time_the_other_way():
    ours = FlowMatching.create()
    theirs = FlowMatching.create(time_direction="to_noise", time_scale=1000.0)
    rng = np.random.default_rng(2)
    x1, x0 = jnp.asarray(rng.standard_normal((2, 3, 2, 2, 4)), jnp.float32)
    t = jnp.asarray([0.1, 0.5, 0.9])
    seen = []

    def network(x, time):
        seen.append(time)
        return x * 0.3

    a = ours.training_losses(network, x1, t, x0)["loss"]
    b = theirs.training_losses(lambda x, time: -network(x, time), x1, t, x0)["loss"]
    np.testing.assert_allclose(a, b)
    np.testing.assert_allclose(seen[1], 1000 * (1 - seen[0]), rtol=1e-6)


def test_the_cosine_term():
    process = FlowMatching.create(cosine_weight=2.0)
    x1, x0 = jnp.zeros((1, 1, 1, 2)), jnp.asarray([[[[-3.0, 0.0]]]])  # the velocity is (3, 0)
    terms = process.training_losses(lambda x, t: jnp.asarray([[[[0.0, 3.0]]]]), x1, jnp.asarray([0.5]), x0)
    np.testing.assert_allclose([terms["mse"][0], terms["cosine"][0], terms["loss"][0]], [9, 1, 11], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"path": "cubic"}, "path is 'cubic'; expected one of linear, gvp, vp"),
        ({"prediction": "eps"}, "prediction is 'eps'; expected one of velocity, score, noise, x0"),
        ({"loss_weight": "likelihood"}, "loss_weight is 'likelihood' with prediction 'velocity'"),
    ],
)
def test_unknown_names_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        FlowMatching.create(**options)


# ------------------------------------------------------------------------------------ training times


DENSITIES = {
    "uniform": (TimeDistribution(), lambda t: t),
    "logit_normal": (
        TimeDistribution("logit_normal", mean=0.5, std=0.7),
        lambda t: scipy.stats.norm.cdf((np.log(t) - np.log1p(-t) - 0.5) / 0.7),
    ),
    "cosmap": (  # SD3, eq. 21: the quantile function's inverse
        TimeDistribution("cosmap"),
        lambda t: 2 / np.pi * np.arctan(t / (1 - t)),
    ),
    "shifted": (TimeDistribution(shift=3.0), lambda t: 3 * t / (1 + 2 * t)),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_times_are_distributed_as_they_should_be(name):
    distribution, cdf = DENSITIES[name]
    t = np.asarray(distribution.draw(jax.random.key(0), 20_000), np.float64)
    assert t.min() > 0 and t.max() < 1
    assert scipy.stats.kstest(t, cdf).pvalue > 1e-3


@pytest.mark.parametrize("scale", [-1.0, 1.29])
def test_mode_is_the_published_map(scale):
    u = np.linspace(0, 1, 11)
    found = TimeDistribution("mode", mode_scale=scale)._mode(jnp.asarray(u))
    np.testing.assert_allclose(found, 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u), atol=1e-6)
    t = np.asarray(TimeDistribution("mode", mode_scale=scale).draw(jax.random.key(1), 20_000))
    assert abs(t.mean() - 0.5) < 0.01  # symmetric


def test_the_shift_is_sd3s_towards_the_noise():
    noise_time = np.linspace(0, 1, 11)
    expected = 3 * noise_time / (1 + 2 * noise_time)
    np.testing.assert_allclose(1 - shifted(1 - noise_time, 3.0), expected)
    # LightningDiT's 0.3, on time towards the data, is SD3's 1 / 0.3.
    t = np.linspace(0, 1, 7)
    np.testing.assert_allclose(shifted(t, 1 / 0.3), 0.3 * t / (1 + (0.3 - 1) * t))
