"""Samplers: randomness by (seed, sample index), the loop, errors, and diffusers' schedulers as a peer."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.samplers import (  # the public address
    ddim_step,
    ddpm_step,
    sample_ddim,
    sample_ddpm,
    sample_keys,
    start_noise,
    step_noise_at,
)

SHAPE = (4, 4, 2)  # (H, W, C)


def network(x, t):
    """Mixes positions and channels of each sample; 2C outputs."""
    mixed = jnp.tanh(x[:, ::-1] - 0.5 * x[..., ::-1] + (t / 1000.0)[:, None, None, None])
    return jnp.concatenate([mixed, jnp.sin(x)], axis=-1)


@pytest.fixture(scope="module")
def process():
    return GaussianDiffusion.create(respacing="12", prediction="v")  # keeps samples of unit size


SAMPLERS = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "ddim_eta1": functools.partial(sample_ddim, eta=1.0),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(process, name, indices):
    keys = sample_keys(jax.random.key(7), indices)
    return SAMPLERS[name](process, network, start_noise(keys, SHAPE), keys)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sample_17_is_the_same_in_any_batch_and_on_any_devices(process, name):
    alone = run(process, name, jnp.array([17]))[0]
    assert jnp.all(jnp.isfinite(alone))
    np.testing.assert_allclose(run(process, name, jnp.arange(24))[17], alone, atol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    indices = jax.device_put(jnp.arange(24), NamedSharding(mesh, PartitionSpec("data")))
    sharded = run(process, name, indices)
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded[17], alone, atol=1e-5)
    assert jnp.abs(sharded[16] - alone).max() > 0.1  # another sample is another picture


def test_one_key_stands_for_the_keys_of_samples_0_to_b(process):
    noise = start_noise(sample_keys(jax.random.key(1), jnp.arange(3)), SHAPE)
    whole = sample_ddpm(process, network, noise, jax.random.key(5))
    keys = sample_keys(jax.random.key(5), jnp.arange(3))
    np.testing.assert_array_equal(sample_ddpm(process, network, noise, keys), whole)
    raw = sample_ddpm(process, network, noise, jax.random.key_data(jax.random.key(5)))
    np.testing.assert_array_equal(raw, whole)
    np.testing.assert_array_equal(sample_ddpm(process, network, noise, jax.random.key_data(keys)), whole)


def test_all_noise_is_independent_standard_normal():
    keys = sample_keys(jax.random.key(2), jnp.arange(50))
    draws = [start_noise(keys, (8, 8, 4)), *(step_noise_at(keys, s, (8, 8, 4)) for s in range(3))]
    flat = jnp.stack(draws).reshape(4 * 50, -1)
    np.testing.assert_allclose(flat.mean(), 0, atol=0.02)
    np.testing.assert_allclose(flat.std(), 1, atol=0.02)
    correlation = np.corrcoef(flat) - np.eye(200)
    assert np.abs(correlation).max() < 0.35  # 256 values each: 5.6 standard deviations


@pytest.mark.parametrize("name", ["ddpm", "ddim_eta1"])
def test_drawn_noise_is_that_of_step_noise_at(process, name):
    """So recorded and drawn noise are one path, and the trajectory ends at the sample."""
    keys = sample_keys(jax.random.key(3), jnp.arange(2))
    noise = start_noise(keys, SHAPE)
    drawn = SAMPLERS[name](process, network, noise, keys)
    recorded = jnp.stack([step_noise_at(keys, s, SHAPE) for s in range(12)])
    trajectory = SAMPLERS[name](process, network, noise, step_noise=recorded, return_trajectory=True)
    assert trajectory.shape == (12, 2, *SHAPE)
    np.testing.assert_allclose(trajectory[-1], drawn, atol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_loop_is_the_steps_in_order(process, clip):
    noise, step_noise = (
        jax.random.normal(jax.random.key(4), (2, *SHAPE)),
        jax.random.normal(jax.random.key(5), (12, 2, *SHAPE)),
    )
    steps = {
        sample_ddpm: lambda out, x, t, e: ddpm_step(process, out, x, t, e, clip_denoised=clip),
        functools.partial(sample_ddim, eta=0.4): lambda out, x, t, e: ddim_step(
            process, out, x, t, e, 0.4, clip_denoised=clip
        ),
    }
    for sample, step in steps.items():
        found = sample(
            process, network, noise, step_noise=step_noise, return_trajectory=True, clip_denoised=clip
        )
        x = noise
        for s in range(12):
            t = jnp.full((2,), 11 - s)
            out = network(x, jnp.asarray(process.timestep_map)[t])
            x = step(out, x, t, step_noise[s])
            np.testing.assert_allclose(found[s], x, atol=1e-5, rtol=1e-5)
        assert (jnp.abs(x).max() <= 1) == clip


def test_no_noise_is_added_at_the_end_and_none_drawn_at_eta_0(process):
    x = jax.random.normal(jax.random.key(6), (2, *SHAPE))
    t = jnp.zeros(2, jnp.int32)
    for step in (ddpm_step, functools.partial(ddim_step, eta=1.0)):
        np.testing.assert_array_equal(
            step(process, network(x, t), x, t, x), step(process, network(x, t), x, t, 9 * x)
        )
    text = str(jax.make_jaxpr(lambda k: sample_ddim(process, network, x, k))(jax.random.key(0)))
    assert "random_bits" not in text
    assert "random_bits" in str(
        jax.make_jaxpr(lambda k: sample_ddpm(process, network, x, k))(jax.random.key(0))
    )


def test_a_known_answer():
    """The exact noise of a single picture leads DDIM from any start to that picture."""
    process = GaussianDiffusion.create(respacing="25", learn_sigma=False, prediction="x0")
    picture = jax.random.uniform(jax.random.key(8), (3, *SHAPE), minval=-1)
    start = jax.random.normal(jax.random.key(9), (3, *SHAPE))
    for sample in SAMPLERS.values():
        found = sample(process, lambda x, t: picture, start, jax.random.key(0))
        np.testing.assert_allclose(found, picture, atol=1e-5)


def test_ddpm_has_the_right_spread():
    """For N(0, 1) data the best eps is x sqrt(1 - ac), and samples must come out N(0, 1)."""
    process = GaussianDiffusion.create(respacing="50", learn_sigma=False, sigma="fixed_large")
    ac = jnp.asarray(GaussianDiffusion.create().alphas_cumprod, jnp.float32)

    def best(x, t):
        return x * jnp.sqrt(1 - ac[t])[:, None, None, None]

    noise = start_noise(sample_keys(jax.random.key(1), jnp.arange(200)), SHAPE)
    for name in ("ddpm", "ddim"):
        found = jax.jit(functools.partial(SAMPLERS[name], process, best))(noise, jax.random.key(2))
        np.testing.assert_allclose(found.std(), 1, atol=0.05)
        np.testing.assert_allclose(found.mean(), 0, atol=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: sample_ddpm(p, network, x), "key and step_noise are missing"),
        (lambda p, x: sample_ddim(p, network, x, eta=0.5), "key and step_noise are missing"),
        (lambda p, x: sample_ddpm(p, network, x, step_noise=x), r"step_noise has shape.*expected \(12, 2,"),
        (
            lambda p, x: sample_ddpm(p, network, x, jax.random.split(jax.random.key(0), 3)),
            "one for each of 2 samples",
        ),
        (lambda p, x: sample_ddim(p, network, x, jax.random.key(0), eta=-0.1), "eta is -0.1"),
        (lambda p, x: sample_ddim(p, network, x, jax.random.key(0), eta=20.0), "eta is 20.0"),
        (
            lambda p, x: ddim_step(p, network(x, jnp.ones(2)), x, jnp.array([1, 2]), eta=0.5),
            "noise is missing",
        ),
        (lambda p, x: sample_ddim(p, lambda x, t: x, x), "network's output has shape"),
    ],
)
def test_errors(process, call, message):
    with pytest.raises(ValueError, match=message):
        call(process, jnp.ones((2, *SHAPE)))


# --------------------------------------------------------------------------------------- diffusers as peer


@pytest.fixture(scope="module")
def peer():
    """(torch, DDIMScheduler, DDPMScheduler)."""
    pytest.importorskip("torch", reason="needs torch (extra: interop)")
    pytest.importorskip("diffusers", reason="needs diffusers (extra: interop)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from diffusers.schedulers import DDIMScheduler, DDPMScheduler
    return torch, DDIMScheduler, DDPMScheduler


SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "timestep_spacing": "leading",
    "clip_sample": False,
}
PREDICTION = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", PREDICTION)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_are_those_of_diffusers(peer, schedule, prediction, eta):
    torch, scheduler_class, _ = peer
    scheduler = scheduler_class(**SCHEDULER, beta_schedule=schedule, prediction_type=PREDICTION[prediction])
    scheduler.set_timesteps(50)
    process = GaussianDiffusion.create("ddim50", schedule, learn_sigma=False, prediction=prediction)
    np.testing.assert_array_equal(process.timestep_map[::-1], scheduler.timesteps)
    x, output, noise = np.random.default_rng(0).normal(size=(3, 2, *SHAPE)).astype(np.float32)
    for step in (49, 30, 7, 1, 0):
        expected = scheduler.step(
            torch.tensor(output),
            int(process.timestep_map[step]),
            torch.tensor(x),
            eta,
            variance_noise=torch.tensor(noise),
        ).prev_sample
        found = ddim_step(
            process, jnp.asarray(output), jnp.asarray(x), jnp.full(2, step), jnp.asarray(noise), eta
        )
        # The peer's alphas_cumprod are float32, which costs 1 - alphas_cumprod its digits at small t.
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("sigma", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTION)
def test_ddpm_steps_are_those_of_diffusers(peer, sigma, prediction):
    torch, _, scheduler_class = peer
    scheduler = scheduler_class(
        **SCHEDULER, beta_schedule="linear", variance_type=sigma, prediction_type=PREDICTION[prediction]
    )
    scheduler.set_timesteps(50)
    learned = sigma == "learned_range"
    process = GaussianDiffusion.create(
        "ddim50", learn_sigma=learned, prediction=prediction, sigma="fixed_small" if learned else sigma
    )
    x, output, fraction = np.random.default_rng(1).normal(size=(3, 2, *SHAPE)).astype(np.float32)
    if learned:
        output = np.concatenate([output, np.tanh(fraction)], axis=-1)
    for step in (49, 30, 7, 1, 0):
        nchw = [torch.tensor(np.moveaxis(a, -1, 1).copy()) for a in (output, x)]
        generator = torch.Generator().manual_seed(step)
        expected = scheduler.step(nchw[0], int(process.timestep_map[step]), nchw[1], generator).prev_sample
        noise = torch.randn(nchw[1].shape, generator=torch.Generator().manual_seed(step)).numpy()
        found = ddpm_step(
            process,
            jnp.asarray(output),
            jnp.asarray(x),
            jnp.full(2, step),
            jnp.asarray(np.moveaxis(noise, 1, -1)),
        )
        np.testing.assert_allclose(found, np.moveaxis(expected.numpy(), 1, -1), rtol=2e-4, atol=2e-5)
