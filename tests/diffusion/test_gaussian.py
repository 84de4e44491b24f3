"""The process: its options, parametrisations, losses and errors."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import DiffusionConfig
from dit_jax.diffusion.create import create_process
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from dit_jax.diffusion.samplers import ddim_step, ddpm_step
from dit_jax.diffusion.schedules import make_betas
from dit_jax.diffusion.timesteps import sample_timesteps, space_timesteps

SHAPE = (5, 4, 6, 3)  # (B, H, W, C)


@pytest.fixture(scope="module")
def inputs():
    """x0, noise, t, fraction of the log variance."""
    x0, noise, fraction = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    return x0, noise, jnp.array([0, 1, 40, 500, 999]), jnp.tanh(fraction)


def wrong_network(process, x0, t, noise):
    """The output, in the process's own prediction, of a network that takes x0 for half of what it is."""
    guess = 0.5 * x0
    x_t = process.q_sample(x0, t, noise)
    return x_t, {
        "x0": guess,
        "epsilon": process.predict_eps(guess, x_t, t),
        "v": velocity(process, guess, process.predict_eps(guess, x_t, t), t),
    }


def velocity(process, x0, eps, t):
    """v of arXiv 2202.00512, eq. 9 of its appendix D, from float64 tables."""
    ac = process.alphas_cumprod[np.asarray(t)].reshape(-1, 1, 1, 1)
    return jnp.asarray(np.sqrt(ac) * np.asarray(eps) - np.sqrt(1 - ac) * np.asarray(x0), jnp.float32)


@pytest.mark.parametrize("step", [ddpm_step, ddim_step])
def test_equivalent_predictions_give_the_same_step(inputs, step):
    x0, noise, t, fraction = inputs
    found = {}
    for prediction in ("epsilon", "x0", "v"):
        process = GaussianDiffusion.create(prediction=prediction)
        x_t, output = wrong_network(process, x0, t, noise)
        output = jnp.concatenate([output[prediction], fraction], axis=-1)
        p = process.p_mean_variance(output, x_t, t)
        np.testing.assert_allclose(p.pred_xstart, 0.5 * x0, atol=1e-4)
        found[prediction] = step(process, output, x_t, t, noise)
    np.testing.assert_allclose(found["epsilon"], found["x0"], atol=1e-5)
    np.testing.assert_allclose(found["v"], found["x0"], atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_perfect_network_has_no_loss(inputs, prediction):
    """Its mse is 0, and its bound is 0 where its variance is the posterior's (fraction -1), t = 0 apart."""
    x0, noise, t, _ = inputs
    process = GaussianDiffusion.create(prediction=prediction)
    target = {"epsilon": noise, "x0": x0, "v": velocity(process, x0, noise, t)}[prediction]
    seen = []

    def network(x, timesteps):
        seen.append(timesteps)
        return jnp.concatenate([target, -jnp.ones_like(target)], axis=-1)

    terms = process.training_losses(network, x0, t, noise)
    np.testing.assert_array_equal(seen[0], t)
    np.testing.assert_allclose(terms["mse"], 0, atol=1e-12)
    np.testing.assert_allclose(terms["vb"][1:], 0, atol=1e-5)


def test_vb_gradient_reaches_only_the_variance(inputs):
    x0, noise, t, fraction = inputs
    process = GaussianDiffusion.create()

    def total(name, prediction, fraction):
        output = jnp.concatenate([prediction, fraction], axis=-1)
        return process.training_losses(lambda x, t: output, x0, t, noise)[name].sum()

    by_prediction, by_fraction = jax.grad(total, argnums=(1, 2))("vb", 0.3 * noise, fraction)
    assert jnp.all(by_prediction == 0)
    assert jnp.all(jnp.abs(by_fraction).max(axis=(1, 2, 3)) > 0)
    kl = dataclasses.replace(process, loss="kl")
    by_prediction = jax.grad(
        lambda p: kl.training_losses(lambda x, t: jnp.concatenate([p, fraction], axis=-1), x0, t, noise)[
            "loss"
        ].sum()
    )(0.3 * noise)
    assert jnp.all(jnp.abs(by_prediction).max(axis=(1, 2, 3)) > 0)


@pytest.mark.parametrize("sigma", ["fixed_small", "fixed_large"])
def test_rescaled_kl_averages_to_the_whole_bound(sigma):
    """The mean over t of T x term t is the sum of all terms, each computed in float64 from the formulas."""
    process = GaussianDiffusion.create(
        schedule="squaredcos_cap_v2", num_timesteps=16, learn_sigma=False, loss="rescaled_kl", sigma=sigma
    )
    rng = np.random.default_rng(1)
    x0 = np.broadcast_to(rng.uniform(-1, 1, (1, 4, 4, 2)), (16, 4, 4, 2))
    eps, noise = rng.normal(size=(2, *x0.shape))
    found = process.training_losses(
        lambda x, t: jnp.asarray(eps, jnp.float32), jnp.asarray(x0), jnp.arange(16), jnp.asarray(noise)
    )
    np.testing.assert_allclose(found["loss"], 16 * found["vb"], rtol=1e-6)

    def column(table):
        return table.reshape(-1, 1, 1, 1)

    beta, ac = column(process.betas), column(np.cumprod(1 - process.betas))
    prev = np.concatenate([np.ones((1, 1, 1, 1)), ac[:-1]])
    x_t = np.sqrt(ac) * x0 + np.sqrt(1 - ac) * noise
    guess = (x_t - np.sqrt(1 - ac) * eps) / np.sqrt(ac)
    gap = beta * np.sqrt(prev) / (1 - ac) * (x0 - guess)  # of the two posteriors' means
    posterior = beta * (1 - prev) / (1 - ac)
    variance = np.where(
        np.arange(16).reshape(beta.shape) == 0, posterior[1], posterior if sigma == "fixed_small" else beta
    )
    with np.errstate(divide="ignore"):
        kl = 0.5 * (np.log(variance / posterior) + (posterior + gap**2) / variance - 1)
    normal_cdf = np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))
    scale = np.sqrt(variance[0])
    upper, lower = normal_cdf((gap[0] + 1 / 255) / scale), normal_cdf((gap[0] - 1 / 255) / scale)
    terms = np.concatenate(
        [-np.log(upper - lower).mean(keepdims=True).reshape(1), kl[1:].mean(axis=(1, 2, 3))]
    )
    np.testing.assert_allclose(found["vb"], terms / math.log(2), rtol=2e-3)
    np.testing.assert_allclose(found["loss"].mean(), (terms / math.log(2)).sum(), rtol=1e-3)


def test_bins_of_the_discretised_likelihood_sum_to_one():
    centres = jnp.linspace(-1, 1, 256)
    for mean, log_scale in ((0.1, -3.0), (-1.0, -2.0), (0.9, 0.5)):
        log_p = discretized_gaussian_log_likelihood(
            centres, jnp.full_like(centres, mean), jnp.full_like(centres, log_scale)
        )
        np.testing.assert_allclose(jnp.exp(log_p).sum(), 1, atol=2e-5)


@pytest.mark.parametrize("log_scale", [-6.5, -4.9, -3.0, 0.0, 3.0])
def test_discretised_likelihood_keeps_its_digits_in_the_tails(published_log_likelihood, log_scale):
    rng = np.random.default_rng(0)
    x = rng.normal(size=50_000).astype(np.float32)
    mean = (x + np.exp(log_scale) * rng.uniform(-9, 9, x.shape)).astype(np.float32)
    scale = np.full_like(x, log_scale)
    exact = published_log_likelihood(x, mean, scale)
    assert exact.min() < -27 or log_scale > 0  # down to the floor
    found = jax.jit(discretized_gaussian_log_likelihood)(x, mean, scale)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-6)


def test_gradients_of_the_discretised_likelihood_are_finite_and_right(published_log_likelihood):
    rng = np.random.default_rng(0)
    x = rng.normal(size=2_000).astype(np.float32)
    mean = (x + np.exp(-4.9) * rng.uniform(-6, 6, x.shape)).astype(np.float32)
    scale = np.full_like(x, -4.9)

    def gradients(x, mean, scale):
        return jax.grad(lambda m, s: discretized_gaussian_log_likelihood(x, m, s).sum(), (0, 1))(mean, scale)

    for i, found in enumerate(gradients(x, mean, scale)):
        step = 1e-6 * np.eye(2)[i]
        after, before = (
            published_log_likelihood(x, mean + sign * step[0], scale + sign * step[1]) for sign in (1.0, -1.0)
        )
        np.testing.assert_allclose(found, (after - before) / 2e-6, rtol=1e-3, atol=1e-2)
    far = jnp.asarray([0.0, 1e-30, 1.0, 1e4, 1e15], jnp.float32)
    wide = jnp.asarray([-1e3, -80.0, -40.0, -9.0, 0.0, 40.0, 80.0, 100.0, 1e3], jnp.float32)
    x, mean, scale = (a.ravel() for a in jnp.meshgrid(jnp.asarray([-1.0, 0.3, 1.0]), far, wide))
    assert np.isfinite(discretized_gaussian_log_likelihood(x, mean, scale)).all()
    for found in gradients(x, mean, scale):
        assert np.isfinite(found).all()


def test_the_term_at_zero_is_its_float64_value(published_log_likelihood):
    """Of networks whose predicted x0 misses by several standard deviations."""
    process = GaussianDiffusion.create()
    rng = np.random.default_rng(0)
    x0, noise, error, fraction = rng.normal(size=(4, 4, 16, 16, 4)).astype(np.float32)
    t = jnp.zeros(4, jnp.int32)
    x_t = process.q_sample(jnp.asarray(x0), t, jnp.asarray(noise))
    output = jnp.concatenate([noise + 4 * error, np.tanh(fraction)], axis=-1)
    p = process.p_mean_variance(output, x_t, t)
    exact = -published_log_likelihood(x0, p.mean, 0.5 * p.log_variance).mean(axis=(1, 2, 3)) / np.log(2)
    np.testing.assert_allclose(process.vb_terms(output, x0, x_t, t), exact, rtol=1e-4)


def test_normal_kl_is_that_of_the_integral():
    grid = np.linspace(-30, 30, 200_001)
    log_p, log_q = (
        -0.5 * ((grid - m) ** 2 / np.exp(v) + v + np.log(2 * np.pi)) for m, v in ((0.3, 0.5), (-1, 1.2))
    )
    expected = np.sum(np.exp(log_p) * (log_p - log_q)) * (grid[1] - grid[0])
    found = normal_kl(*(jnp.float32(v) for v in (0.3, 0.5, -1, 1.2)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_clipping_and_fixed_variances(inputs):
    x0, noise, t, _ = inputs
    for sigma, table in (
        ("fixed_small", lambda p: p.posterior_variance),
        ("fixed_large", lambda p: np.append(p.posterior_variance[1], p.betas[1:])),
    ):
        process = GaussianDiffusion.create(learn_sigma=False, sigma=sigma, prediction="x0")
        x_t = process.q_sample(x0, t, noise)
        p = process.p_mean_variance(3 * x0, x_t, t, clip_denoised=True)
        np.testing.assert_array_equal(p.pred_xstart, jnp.clip(3 * x0, -1, 1))
        np.testing.assert_allclose(p.variance[:, 0, 0, 0], table(process)[np.asarray(t)], rtol=1e-6)
        assert p.variance.shape == p.log_variance.shape == SHAPE
        assert jnp.all(jnp.isfinite(p.log_variance))


def test_respaced_process_keeps_the_marginals():
    full, thin = GaussianDiffusion.create(), GaussianDiffusion.create(respacing="ddim50")
    np.testing.assert_allclose(thin.alphas_cumprod, full.alphas_cumprod[thin.timestep_map], rtol=1e-12)
    assert (full.num_timesteps, thin.num_timesteps) == (1000, 50)


def test_network_is_given_original_timesteps():
    process = GaussianDiffusion.create(respacing="ddim50", learn_sigma=False)
    x, seen = jnp.zeros((2, 4, 4, 1)), []
    process.training_losses(lambda x, t: seen.append(t) or x, x, jnp.array([3, 49]), x)
    np.testing.assert_array_equal(seen[0], [60, 980])


def test_bfloat16_output_is_taken_in_float32(inputs):
    x0, noise, t, fraction = inputs
    process = GaussianDiffusion.create()
    output = jnp.concatenate([noise, fraction], axis=-1).astype(jnp.bfloat16)
    terms = process.training_losses(lambda x, t: output, x0, t, noise)
    assert {v.dtype for v in terms.values()} == {jnp.dtype(jnp.float32)}
    assert process.p_mean_variance(output, x0, t).mean.dtype == jnp.float32


def test_step_out_of_range():
    """Known values raise; traced ones give NaN, where a gather alone would clamp or wrap."""
    process = GaussianDiffusion.create(respacing="10", learn_sigma=False)
    x = jnp.ones((2, 4, 4, 1))
    for bad in ([0, 10], [-1, 3]):
        with pytest.raises(IndexError, match="expected steps from 0 to 9"):
            process.q_sample(x, jnp.array(bad), x)
        loss = jax.jit(lambda t: process.training_losses(lambda x, t: x, x, t, x)["loss"])(jnp.array(bad))
        np.testing.assert_array_equal(jnp.isnan(loss), [not 0 <= b < 10 for b in bad])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: p.q_sample(x, jnp.array([1]), x), r"expected integers of shape \(2,\)"),
        (lambda p, x: p.q_sample(x, jnp.array([1.0, 2.0]), x), "expected integers"),
        (lambda p, x: p.q_sample(x, jnp.array([1, 2]), x[:1]), "noise has shape"),
        (
            lambda p, x: p.p_mean_variance(x, x, jnp.array([1, 2])),
            r"expected \(2, 4, 4, 2\).*learn_sigma=True",
        ),
        (lambda p, x: p.training_losses(lambda x, t: x, x, jnp.array([1, 2]), x), "network's output"),
    ],
)
def test_misshapen_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(GaussianDiffusion.create(), jnp.ones((2, 4, 4, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosine"}, "schedule is 'cosine'; expected one of linear, squaredcos_cap_v2"),
        ({"loss": "l1"}, "loss is 'l1'; expected one of mse"),
        ({"prediction": "eps"}, "prediction is 'eps'; expected one of epsilon"),
        ({"sigma": "learned"}, "sigma is 'learned'; expected one of fixed_small"),
        ({"num_timesteps": 20}, "num_timesteps is 20; expected more than 20 for the linear schedule"),
        ({"num_timesteps": 1, "schedule": "squaredcos_cap_v2"}, "expected at least 2"),
        ({"respacing": "1001"}, "expected at most 1000 timesteps in section 1"),
        ({"respacing": "10,600"}, "expected at most 500 timesteps in section 2"),
        ({"respacing": "ddim999"}, "expected a count that an integer stride over 1000 gives"),
        ({"respacing": "ddim"}, "expected positive step counts"),
        ({"respacing": "ten"}, "expected positive step counts"),
        ({"respacing": "10,,5"}, "expected positive step counts"),
        ({"respacing": "10,-5"}, "expected positive step counts"),
        ({"respacing": "0"}, "expected positive step counts"),
        ({"respacing": "1"}, "keeps 1 timestep; expected at least 2"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion.create(**options)


def test_impossible_tables():
    for betas in ([0.1], [0.1, 1.0], [[0.1, 0.2]], [0.0, 0.1]):
        with pytest.raises(ValueError, match="betas are"):
            GaussianDiffusion(np.array(betas), np.arange(2))
    with pytest.raises(ValueError, match="timestep_map has shape"):
        GaussianDiffusion(np.array([0.1, 0.2]), np.arange(3))


def test_linear_schedule_keeps_its_total_noise():
    """The ends scale with 1000 / T, so the last alphas_cumprod hardly depends on T."""
    last = [np.log(np.prod(1 - make_betas("linear", n))) for n in (500, 1000, 4000)]
    np.testing.assert_allclose(last, last[1], rtol=0.02)
    np.testing.assert_allclose(make_betas("linear", 4000)[[0, -1]], [2.5e-5, 5e-3], rtol=1e-12)


@pytest.mark.parametrize("steps", [50, 1000, 4000])
def test_respacing_of_any_length(steps):
    np.testing.assert_array_equal(space_timesteps(steps, ""), np.arange(steps))
    np.testing.assert_array_equal(space_timesteps(steps, str(steps)), np.arange(steps))
    np.testing.assert_array_equal(space_timesteps(steps, "ddim25"), np.arange(0, steps, steps // 25))
    assert space_timesteps(steps, "10").tolist()[::9] == [0, steps - 1]


def test_create_process_takes_every_option():
    config = DiffusionConfig("squaredcos_cap_v2", 400, "v", False, "fixed_small", "rescaled_mse")
    process = create_process(config, "ddim20")
    assert dataclasses.asdict(config) == {
        "kind": "gaussian",
        "schedule": "squaredcos_cap_v2",
        "num_timesteps": 400,
        **{k: getattr(process, k) for k in ("prediction", "learn_sigma", "sigma", "loss")},
    }
    np.testing.assert_array_equal(process.timestep_map, np.arange(0, 400, 20))
    expected = np.cumprod(1 - make_betas("squaredcos_cap_v2", 400))[::20]
    np.testing.assert_allclose(process.alphas_cumprod, expected, rtol=1e-12)


def test_timesteps_are_uniform():
    t = sample_timesteps(jax.random.key(3), 8000, 8)
    assert t.dtype == jnp.int32
    np.testing.assert_allclose(np.bincount(t, minlength=8), 1000, atol=150)
