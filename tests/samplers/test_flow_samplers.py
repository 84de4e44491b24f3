"""Euler, Heun and Euler-Maruyama against every step recorded from SiT; and on a Gaussian, whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion.flow import FlowMatching
from dit_jax.samplers.ode import sample_ode
from dit_jax.samplers.sde import sample_sde

CASES = [("linear", "velocity", None), ("vp", "noise", "velocity"), ("gvp", "score", "likelihood")]


def nhwc(x):
    return np.moveaxis(x, -3, -1)


def close(found, expected):
    """1e-5 of the state's RMS (1e-5 where that is below 1), and 1e-4 relative."""
    for one, other in zip(found, expected, strict=True):
        rms = max(1.0, float(np.sqrt(np.mean(np.square(other)))))
        np.testing.assert_allclose(one, other, atol=1e-5 * rms, rtol=1e-4)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize(("path", "prediction", "weight"), CASES)
def test_ode_steps(sit, sit_network, path, prediction, weight, method):
    process = FlowMatching.create(path, prediction, weight)
    case = f"{path}-{prediction}-{weight or 'none'}"
    name = "ode_heun2" if method == "heun" else "ode_euler"
    low, high = process.sampling_interval()
    np.testing.assert_allclose([low, high], sit[f"{case}/ode_t"][[0, -1]], rtol=1e-6)

    @jax.jit
    def sample(z):
        return sample_ode(process, sit_network, z, steps=6, method=method, return_trajectory=True)

    close(sample(nhwc(sit["z"])), nhwc(sit[f"{case}/{name}"]))


@pytest.mark.parametrize("last_step", ["mean", "euler"])
@pytest.mark.parametrize("form", ["sbdm", "sigma", "linear"])
@pytest.mark.parametrize(("path", "prediction", "weight"), CASES)
def test_sde_steps(sit, sit_network, path, prediction, weight, form, last_step):
    process = FlowMatching.create(path, prediction, weight)
    case = f"{path}-{prediction}-{weight or 'none'}/sde_{form}_{last_step}"
    if case not in sit:  # linear-velocity-none was not recorded with sbdm, which is infinite at its start
        with pytest.raises(ValueError, match="'sbdm' is infinite at t = 0"):
            sample_sde(process, sit_network, sit["z"], jax.random.key(0), diffusion_form=form)
        return

    @jax.jit
    def sample(z, step_noise):
        return sample_sde(
            process, sit_network, z, steps=6, diffusion_form=form, last_step=last_step,
            step_noise=step_noise, return_trajectory=True,
        )  # fmt: skip

    close(sample(nhwc(sit["z"]), nhwc(sit["sde_noise"])), nhwc(sit[case]))


# ------------------------------------------------------------------------- a Gaussian: exact answers

MEAN, STD = 0.7, 0.3  # of the data


def exact(process):
    """The network that is right for data from N(MEAN, STD^2): E[v | x]."""

    def network(x, t):
        p = process.levels(t, x)
        variance = p.alpha**2 * STD**2 + p.sigma**2
        noise = p.sigma * (x - p.alpha * MEAN) / variance
        x0 = MEAN + p.alpha * STD**2 * (x - p.alpha * MEAN) / variance
        return p.d_alpha * x0 + p.d_sigma * noise

    return network


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_the_error_falls_with_the_solvers_order(path, method, order):
    process = FlowMatching.create(path)
    z = jnp.linspace(-2, 2, 9).reshape(-1, 1, 1, 1)
    errors = [
        np.abs(
            sample_ode(process, exact(process), z, steps=steps + 1, method=method) - (MEAN + STD * z)
        ).max()
        for steps in (8, 16, 32)
    ]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert np.all(np.abs(orders - order) < 0.35), orders


@pytest.mark.parametrize("form", ["sigma", "linear", "constant", "decreasing", "increasing_decreasing"])
def test_the_sde_has_the_datas_mean_and_variance(form):
    process = FlowMatching.create()
    z = jax.random.normal(jax.random.key(0), (2000, 1, 1, 4))
    x = jax.jit(
        lambda z: sample_sde(
            process,
            exact(process),
            z,
            jax.random.key(1),
            steps=200,
            diffusion_form=form,
            last_step="euler",
            last_step_size=0.01,
        )
    )(z)
    # 8,000 numbers: four standard errors, and what 200 steps leave.
    assert abs(float(x.mean()) - MEAN) < 4 * STD / np.sqrt(8000) + 0.01
    assert abs(float(x.std()) - STD) < 4 * STD / np.sqrt(16000) + 0.015


def test_a_sample_depends_on_its_own_key_alone():
    process = FlowMatching.create()
    keys = jax.random.split(jax.random.key(3), 4)
    z = jax.random.normal(jax.random.key(4), (4, 1, 1, 2))
    whole = sample_sde(process, exact(process), z, keys, steps=5)
    part = sample_sde(process, exact(process), z[2:3], keys[2:3], steps=5)
    np.testing.assert_allclose(whole[2:3], part, rtol=1e-6)


def test_what_cannot_be_sampled_is_refused():
    process, z = FlowMatching.create(), jnp.zeros((1, 1, 1, 1))
    with pytest.raises(ValueError, match="method is 'rk4'; expected euler or heun"):
        sample_ode(process, exact(process), z, method="rk4")
    with pytest.raises(ValueError, match="steps is 1; expected at least 2"):
        sample_ode(process, exact(process), z, steps=1)
    with pytest.raises(ValueError, match="last_step is 'heun'"):
        sample_sde(process, exact(process), z, jax.random.key(0), last_step="heun")
    with pytest.raises(ValueError, match="key and step_noise are missing"):
        sample_sde(process, exact(process), z)
    with pytest.raises(ValueError, match="diffusion_form is 'cubic'"):
        sample_sde(process, exact(process), z, jax.random.key(0), diffusion_form="cubic")
