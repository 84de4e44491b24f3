"""What every process keeps to, whichever it is: the protocol that training and sampling build on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import predictions
from dit_jax.diffusion.flow import FlowMatching
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.times import TimeDistribution
from dit_jax.training.step import quarter_of

SHAPE = (5, 4, 4, 2)  # B, H, W, C
SHIFTED = TimeDistribution("logit_normal", mean=-0.5, shift=3.0)

PROCESSES = {
    "gaussian": GaussianDiffusion.create(),
    "gaussian respaced": GaussianDiffusion.create("25", "squaredcos_cap_v2", prediction="v"),
    "gaussian x0": GaussianDiffusion.create(learn_sigma=False, num_timesteps=60, prediction="x0"),
    "gaussian kl": GaussianDiffusion.create(loss="kl", num_timesteps=60),
    "flow": FlowMatching.create(),
    "flow to noise": FlowMatching.create(
        time_direction="to_noise", time_scale=1000.0, cosine_weight=0.5, times=SHIFTED
    ),
    "flow linear x0": FlowMatching.create("linear", "x0", "velocity"),
    "flow gvp score": FlowMatching.create("gvp", "score", "likelihood"),
    "flow vp noise": FlowMatching.create("vp", "noise"),
}


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


@pytest.fixture
def example(process):
    """(x0, t, noise) of a batch, with times from one end to the other."""
    rng = np.random.default_rng(0)
    x0, noise = jnp.asarray(rng.standard_normal((2, *SHAPE)), jnp.float32)
    times = np.sort(np.asarray(process.training_times(jax.random.key(1), 200)))
    return x0, jnp.asarray(times[[5, 50, 100, 150, 195]]), noise


def channels_out(process):
    """Of the network, for C = 2."""
    return 4 if getattr(process, "learn_sigma", False) else 2


def linear_network(process, weight=0.5):
    """A network that looks at one position and at the condition, (B,), and at time a little."""

    def network(x, t, condition):
        out = weight * x * jnp.cos(t * 1e-3).reshape(-1, 1, 1, 1) + condition.reshape(-1, 1, 1, 1)
        return jnp.concatenate([out] * (channels_out(process) // 2), axis=-1)

    return network


CONDITION = jnp.arange(5.0)


def test_losses_are_per_example_and_named(process, example):
    terms = process.losses(linear_network(process), *example, CONDITION)
    assert process.loss_names[0] == "loss"
    assert "loss" in terms and terms.keys() <= set(process.loss_names)
    for name, values in terms.items():
        assert values.shape == (5,) and values.dtype == jnp.float32, name
        assert np.isfinite(values).all(), name


def test_examples_of_a_batch_do_not_know_of_each_other(process, example):
    x0, t, noise = example
    network = linear_network(process)
    before = process.losses(network, x0, t, noise, CONDITION)
    other = [a.at[1].set(b) for a, b in ((x0, 3.0), (t, t[0]), (noise, -1.0), (CONDITION, 7.0))]
    after = process.losses(network, *other)
    for name in before:
        same = np.asarray(before[name]) == np.asarray(after[name])
        assert same[[0, 2, 3, 4]].all(), name
        assert not same[1] or np.ptp(before[name]) == 0, name


def test_gradients_are_finite_and_there(process, example):
    def loss(weight):
        return process.losses(linear_network(process, weight), *example, CONDITION)["loss"].mean()

    gradient = jax.grad(loss)(0.5)
    assert np.isfinite(gradient) and gradient != 0


def test_gradients_are_finite_where_a_new_network_starts(process, example):
    """Its last layer is zero, and so is its output."""
    zero = jnp.zeros((*SHAPE[:-1], channels_out(process)))
    loss = lambda output: process.training_losses(lambda x, t: output, *example)["loss"].mean()  # noqa: E731
    gradient = np.asarray(jax.grad(loss)(zero))
    assert np.isfinite(gradient).all() and 0 < np.abs(gradient).max() < 1e3


def test_losses_close_the_network_over_its_condition(process, example):
    x0, t, noise = example
    seen = []

    def network(x, shown, condition):
        seen.append((x, shown, condition))
        return linear_network(process)(x, shown, condition)

    given = process.losses(network, x0, t, noise, CONDITION)
    closed = process.training_losses(
        lambda x, shown: linear_network(process)(x, shown, CONDITION), x0, t, noise
    )
    x, shown, condition = seen[0]
    np.testing.assert_array_equal(condition, CONDITION)
    np.testing.assert_array_equal(shown, process.shown_time(t))
    np.testing.assert_array_equal(x, process.q_sample(x0, t, noise))
    for name in given:
        np.testing.assert_array_equal(given[name], closed[name])


def test_a_network_that_knows_has_no_error(process, example):
    x0, t, noise = example
    p = process.levels(t, x0)
    wanted = predictions.target(process.predicts, x0, noise, p)
    rest = jnp.zeros((*SHAPE[:-1], channels_out(process) - SHAPE[-1]))
    sign = -1.0 if getattr(process, "time_direction", "") == "to_noise" else 1.0

    def network(x, t, condition):
        return jnp.concatenate([sign * condition, rest], axis=-1)

    mse = process.losses(network, x0, t, noise, wanted).get("mse", jnp.zeros(5))
    np.testing.assert_allclose(mse, 0, atol=1e-8)
    if "mse" in process.losses(network, x0, t, noise, wanted):
        wrong = process.losses(network, x0, t, noise, wanted + 1)["mse"]
        assert (np.asarray(wrong) > 1e-6).all()


def test_levels_are_those_of_q_sample(process, example):
    x0, t, noise = example
    p = process.levels(t, x0)
    assert p.alpha.shape == p.sigma.shape == (5, 1, 1, 1)
    np.testing.assert_allclose(process.q_sample(x0, t, noise), p.alpha * x0 + p.sigma * noise, rtol=1e-6)
    ones, none = jnp.ones(SHAPE), jnp.zeros(SHAPE)
    np.testing.assert_allclose(process.q_sample(ones, t, none)[:, 0, 0, 0], p.alpha[:, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(process.q_sample(none, t, ones)[:, 0, 0, 0], p.sigma[:, 0, 0, 0], rtol=1e-6)


def test_derivatives_are_along_the_path(process):
    like = jnp.zeros((2, 1))
    if isinstance(process, FlowMatching):
        times = jnp.asarray([0.299, 0.301]), jnp.asarray([0.3, 0.7]), jnp.asarray([0.699, 0.701])
    else:
        at = process.num_timesteps // 2
        times = jnp.asarray([at - 1, at + 1]), jnp.asarray([at, at]), jnp.asarray([at - 1, at + 1])
    middle = process.levels(times[1], like)
    for i, ends in ((0, times[0]), (1, times[2])):
        p = process.levels(ends, like)
        moved = np.asarray([p.alpha[1, 0] - p.alpha[0, 0], p.sigma[1, 0] - p.sigma[0, 0]])
        tangent = np.asarray([middle.d_alpha[i, 0], middle.d_sigma[i, 0]])
        cosine = moved @ tangent / np.linalg.norm(moved) / np.linalg.norm(tangent)
        assert cosine > 0.999


def test_a_prediction_gives_every_other_and_comes_back(process, example):
    x0, t, noise = example
    p, x = process.levels(t, x0), process.q_sample(x0, t, noise)
    given = predictions.target(process.predicts, x0, noise, p)
    for kind in predictions.PREDICTIONS:
        found = getattr(predictions, f"to_{kind}")(process.predicts, given, x, p)
        back = getattr(predictions, f"to_{process.predicts}")(kind, found, x, p)
        scale = float(
            jnp.max(jnp.maximum(p.alpha / p.sigma, p.sigma / p.alpha))
        )  # what rounding is amplified by
        np.testing.assert_allclose(back, given, rtol=1e-4, atol=2e-6 * scale, err_msg=kind)
        expected = predictions.target(kind, x0, noise, p)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6 * scale, err_msg=kind)


def test_the_prediction_is_the_first_channels_in_float32(process, example):
    x0, t, _ = example
    output = jnp.asarray(
        np.random.default_rng(1).normal(size=(*SHAPE[:-1], channels_out(process))), jnp.bfloat16
    )
    found = process.predict(lambda x, t: output, x0, t)
    assert found.dtype == jnp.float32 and found.shape == SHAPE
    np.testing.assert_array_equal(jnp.abs(found), jnp.abs(output[..., :2]).astype(jnp.float32))


def test_training_times_are_of_the_key_and_in_range(process):
    draw = jax.jit(process.training_times, static_argnums=1)
    t, again, other = (np.asarray(draw(jax.random.key(k), 2000)) for k in (0, 0, 1))
    np.testing.assert_array_equal(t, again)
    np.testing.assert_allclose(t, process.training_times(jax.random.key(0), 2000), rtol=1e-5)
    assert t.shape == (2000,) and (t != other).any()
    like = jnp.zeros((2000, 1, 1, 1))
    p = process.levels(jnp.asarray(t), like)
    assert all(np.isfinite(level).all() for level in p)
    assert (np.asarray(p.alpha) > 0).any() and (np.asarray(p.sigma) > 0).all()
    assert np.ptp(np.asarray(process.noise_level(jnp.asarray(t)))) > 0.8  # they cover it
    if isinstance(process, FlowMatching):
        low, high = process.training_interval()
        assert t.dtype == np.float32 and low <= t.min() and t.max() <= high
        drawn = np.asarray(process.times.draw(jax.random.key(0), 2000))
        np.testing.assert_allclose((t - low) / (high - low), drawn, atol=1e-5)
    else:
        assert t.dtype == np.int32 and set(t) <= set(range(process.num_timesteps))


def test_the_noise_level_grows_with_the_noise(process):
    t = process.training_times(jax.random.key(3), 500)
    p = process.levels(t, t)
    ratio, level = np.asarray(p.sigma / p.alpha), np.asarray(process.noise_level(t))
    order = np.argsort(ratio)
    assert level.min() >= 0 and level.max() <= 1
    assert (np.diff(level[order]) >= -1e-6).all()
    quarters = np.asarray(quarter_of(process.noise_level(t)))
    assert set(quarters) == {0, 1, 2, 3}
    assert ratio[quarters == 0].max() <= ratio[quarters == 3].min()


def test_the_noise_level_of_what_the_network_is_shown_is_that_of_the_time(process):
    t = process.training_times(jax.random.key(4), 50)
    found = process.shown_noise_level(process.shown_time(t))
    np.testing.assert_allclose(found, process.noise_level(t), atol=1e-5)


@pytest.mark.parametrize("steps", [7, 100, 999, 1000, 4096])
def test_quarters_of_steps_are_exact(steps):
    process = GaussianDiffusion.create(schedule="squaredcos_cap_v2", num_timesteps=steps)
    t = jnp.arange(steps)
    expected = np.arange(steps) * 4 // steps
    np.testing.assert_array_equal(quarter_of(process.noise_level(t)), expected)
    np.testing.assert_array_equal(jax.jit(lambda t: quarter_of(process.noise_level(t)))(t), expected)


def test_quarters_hold_both_ends():
    np.testing.assert_array_equal(quarter_of(jnp.asarray([0, 0.2499, 0.25, 0.7501, 1.0])), [0, 0, 1, 3, 3])


def test_compiled_and_mapped_it_is_the_same(process, example):
    network = linear_network(process)

    def losses(x0, t, noise, condition):
        return process.losses(network, x0, t, noise, condition)["loss"]

    expected = losses(*example, CONDITION)
    np.testing.assert_allclose(jax.jit(losses)(*example, CONDITION), expected, rtol=1e-4)
    one_by_one = [a[:, None] for a in (*example, CONDITION)]
    mapped = jax.jit(jax.vmap(losses))(*one_by_one)
    np.testing.assert_allclose(mapped[:, 0], expected, rtol=1e-4)
