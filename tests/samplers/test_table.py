"""The table of samplers: each serves and costs what it says, and with an exact network leads to the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import predictions
from dit_jax.diffusion.flow import FlowMatching
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.samplers import sample_ddim, sample_ddpm
from dit_jax.samplers.course import course_of
from dit_jax.samplers.grid import GRIDS, make_times
from dit_jax.samplers.noise import sample_keys, start_noise
from dit_jax.samplers.table import DEFAULT, SAMPLERS, Choice, plan, sample, samplers_for

PROCESSES = {
    "gaussian": GaussianDiffusion.create(learn_sigma=False),
    "v": GaussianDiffusion.create(learn_sigma=False, prediction="v", schedule="squaredcos_cap_v2"),
    "flow": FlowMatching.create(),
    "vp": FlowMatching.create("vp", "noise"),
}
# Of the data, two channels; the network's answer is linear in x.
MEAN = np.array([0.5, -0.2])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])
VARIANCES, AXES = np.linalg.eigh(COVARIANCE)


def exact(process, count=lambda: None):
    """The network that is right for data from N(MEAN, COVARIANCE)."""
    course = course_of(process)
    gaussian = isinstance(process, GaussianDiffusion)

    def network(x, t):
        jax.debug.callback(count)
        if gaussian:
            log = 0.5 * jnp.asarray(np.log(process.alphas_cumprod), jnp.float32)
            alpha = jnp.exp(jnp.interp(t.astype(jnp.float32), jnp.arange(1000.0), log))[:, None, None, None]
            sigma = jnp.sqrt(1 - alpha**2)
            p = predictions.Point(alpha, sigma, -sigma, alpha)
        else:
            p = process.levels(t, x)
        spread = jnp.asarray(VARIANCES, jnp.float32).reshape(1, 1, 1, 2)
        mean = jnp.asarray(MEAN, jnp.float32).reshape(1, 1, 1, 2)
        gain = p.alpha * spread / (p.alpha**2 * spread + p.sigma**2)
        x0 = mean + ((x - p.alpha * mean) @ AXES * gain) @ AXES.T
        return predictions.target(course.predicts, x0, (x - p.alpha * x0) / jnp.maximum(p.sigma, 1e-6), p)

    return network


@functools.cache
def drawn(process, choice, batch=3000):
    keys = sample_keys(jax.random.key(1), jnp.arange(batch))
    network = exact(PROCESSES[process])
    run = jax.jit(
        lambda keys: sample(PROCESSES[process], network, start_noise(keys, (1, 1, 2)), keys, choice=choice)
    )
    return jax.device_get(run(keys))


@pytest.fixture(autouse=True)
def adaptive(request):
    """What the adaptive sampler needs."""
    if "dopri5" in request.node.name or "adaptive" in request.node.name:
        pytest.importorskip("diffrax", reason="needs diffrax")


def cases():
    """(process, sampler) of every pair that is served."""
    return [(process, name) for process in ("gaussian", "flow") for name in samplers_for(PROCESSES[process])]


@pytest.mark.parametrize(
    ("process", "name"), [*cases(), ("v", "dopri5"), ("v", "unipc_3"), ("vp", "dpmpp_2m")]
)
def test_samples_have_the_datas_mean_and_covariance(process, name):
    x = drawn(process, Choice(name, steps=100, eta=0.5 if name == "ddim" else 0.0)).x[:, 0, 0]
    deviation = np.sqrt(np.diag(COVARIANCE))
    # Five standard errors of 3,000 samples, and what 100 steps of the worst solver leave.
    np.testing.assert_allclose(x.mean(0), MEAN, atol=5 * deviation.max() / np.sqrt(len(x)) + 0.01)
    np.testing.assert_allclose(np.cov(x.T), COVARIANCE, atol=5 * np.sqrt(2 / len(x)) * 0.5 + 0.025)


@pytest.mark.parametrize(("process", "name"), cases())
def test_the_network_runs_as_often_as_is_said(process, name):
    calls = []
    choice = Choice(name, steps=5)
    keys = sample_keys(jax.random.key(1), jnp.arange(2))
    network = exact(PROCESSES[process], lambda: calls.append(0))
    result = jax.jit(
        lambda keys: sample(PROCESSES[process], network, start_noise(keys, (1, 1, 2)), keys, choice=choice)
    )(keys)
    jax.effects_barrier()
    assert len(calls) == result.evaluations
    known = plan(PROCESSES[process], choice).evaluations
    row = SAMPLERS[name]
    if row.evaluations is None:
        assert known is None
    else:
        # Heun's last step on a Gaussian process is Euler's.
        assert len(calls) == known == 5 * row.evaluations - (name == "heun" and process == "gaussian")
    text = str(
        jax.make_jaxpr(lambda k: sample(PROCESSES[process], network, result.x, k, choice=choice).x)(keys)
    )
    assert ("random_bits" in text) == row.draws


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("process", PROCESSES)
def test_grids_lead_from_noise_to_data(process, grid):
    course = course_of(PROCESSES[process])
    if grid == "respaced" and process in ("flow", "vp"):
        with pytest.raises(ValueError, match="grid is 'respaced', which counts timesteps"):
            make_times(course, grid, 5)
        return
    for steps in (2, 7, 60):
        times = make_times(course, grid, steps)
        assert len(times) == steps + 1 and (times[0], times[-1]) == (course.start, course.end)
        assert (np.sign(course.end - course.start) * np.diff(times) > 0).all()


def test_grids_are_even_in_what_they_say():
    for process in PROCESSES.values():
        course = course_of(process)
        p = course.levels(make_times(course, "lambda", 12)[1:-1])
        widths = np.diff(np.log(p.alpha / p.sigma))
        np.testing.assert_allclose(widths, widths[0], rtol=1e-6)
        p = course.levels(make_times(course, "karras", 12)[1:-1])
        widths = np.diff((p.sigma / p.alpha) ** (1 / 7))
        np.testing.assert_allclose(widths, widths[0], rtol=1e-6)
    flow, gaussian = course_of(PROCESSES["flow"]), course_of(PROCESSES["gaussian"])
    np.testing.assert_allclose(make_times(gaussian, "uniform", 4), [999, 749, 499, 249, -1])
    np.testing.assert_allclose(make_times(flow, "quadratic", 4), 1 - np.array([1, 9 / 16, 1 / 4, 1 / 16, 0]))
    np.testing.assert_allclose(1 - make_times(flow, "shifted", 2, grid_shift=3.0), [1, 0.75, 0])


def test_a_grid_of_the_users_own_is_followed():
    times = (999.0, 500.0, 100.0, -1.0)
    process = PROCESSES["gaussian"]
    found = drawn("gaussian", Choice("ddim", grid=times), batch=3).x
    thin = process.thin(np.array([100, 500, 999]))
    keys = sample_keys(jax.random.key(1), jnp.arange(3))
    expected = sample_ddim(thin, exact(process), start_noise(keys, (1, 1, 2)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_ddpm_and_ddim_are_those_of_the_respaced_process():
    keys = sample_keys(jax.random.key(1), jnp.arange(3))
    respaced = GaussianDiffusion.create("20", learn_sigma=False)
    noise, network = start_noise(keys, (1, 1, 2)), exact(PROCESSES["gaussian"])
    for name, direct in (("ddpm", sample_ddpm), ("ddim", sample_ddim)):
        expected = direct(respaced, network, noise, keys)
        np.testing.assert_allclose(drawn("gaussian", Choice(name, steps=20), batch=3).x, expected, atol=1e-5)


def test_euler_on_a_gaussian_process_is_ddim():
    times = tuple(make_times(course_of(PROCESSES["v"]), "karras", 7))
    euler, ddim = (drawn("v", Choice(name, grid=times), batch=3).x for name in ("euler", "ddim"))
    np.testing.assert_allclose(euler, ddim, atol=2e-5)


def test_few_steps_from_a_schedule_without_signal_do_not_fly_off():
    """The cosine schedule ends at sigma / alpha = 20,000: a second slope there would be multiplied by as much."""
    best = drawn("v", Choice("unipc_3", steps=60, grid="lambda"), batch=20).x
    error = {
        name: np.sqrt(np.mean((drawn("v", Choice(name, steps=6), batch=20).x - best) ** 2))
        for name in ("ddim", "heun", "ab2", "ab4")
    }
    assert error["heun"] < error["ddim"] / 2 and error["ab4"] < error["ab2"] < error["ddim"] < 0.3


@pytest.mark.parametrize("process", ["gaussian", "flow"])
def test_an_adaptive_sample_does_not_depend_on_its_batch(process):
    many, few = (drawn(process, Choice("dopri5"), batch=batch) for batch in (20, 3))
    np.testing.assert_allclose(many.x[:3], few.x, atol=1e-4)
    assert 20 < few.evaluations <= many.evaluations < 200


@pytest.mark.parametrize(
    ("process", "choice", "message"),
    [
        ("flow", Choice("ddpm"), "sampler is 'ddpm'; expected one of ddim, euler, heun"),
        ("gaussian", Choice("rk4"), "sampler is 'rk4'; expected one of ddpm, ddim"),
        ("gaussian", Choice("ddim", steps=1), "steps is 1; expected 2 to 1000"),
        ("gaussian", Choice("ddim", steps=1001), "steps is 1001; expected 2 to 1000"),
        ("gaussian", Choice("dpmpp_2m", steps=0), "steps is 0; expected at least 1"),
        (
            "gaussian",
            Choice("dpmpp_2m", steps=1001),
            "steps is 1001, with which grid 'uniform' steps over the last timestep",
        ),
        ("gaussian", Choice("heun", eta=0.5), "eta is 0.5; expected 0 for sampler 'heun'"),
        ("flow", Choice("ddim", eta=-1.0), "eta is -1.0; expected 0 or more"),
        ("gaussian", Choice("heun", grid="cubic"), "grid is 'cubic'; expected one of uniform"),
        (
            "gaussian",
            Choice("ddpm", grid="karras", steps=9),
            "grid holds other times than whole timesteps and -1",
        ),
        (
            "gaussian",
            Choice("heun", grid=(999.0, -0.5, -1.0)),
            "grid holds -0.5, at which the network cannot",
        ),
        ("gaussian", Choice("heun", grid=(0.0, 1.0)), "each nearer to the data"),
        ("flow", Choice("heun", grid=(0.0, 1.5)), "grid holds 1.5; expected 0 to 1"),
        ("flow", Choice("heun", grid=(0.5,)), "expected two or more"),
        ("flow", Choice("heun", grid="shifted", grid_shift=0.0), "grid_shift is 0.0"),
        ("flow", Choice("dopri5", grid="karras"), "grid is 'karras'; expected none"),
    ],
)
def test_what_the_mathematics_does_not_allow_is_refused(process, choice, message):
    with pytest.raises(ValueError, match=message) as refused:
        plan(PROCESSES[process], choice)
    assert "\n" not in str(refused.value)


def test_a_process_without_a_course_is_named():
    with pytest.raises(TypeError, match="the process is a int"):
        plan(3, Choice())


def test_the_default_serves_every_process():
    for process in PROCESSES.values():
        assert DEFAULT in samplers_for(process)
