"""Averages of the parameters against direct sums in float64."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from dit_jax.config import ConfigError, from_json
from dit_jax.runs import averages as power
from dit_jax.runs.checkpoint import CheckpointError
from dit_jax.runs.snapshots import SnapshotArgs, Snapshots, main, reconstruct
from dit_jax.runs.weights import load_weights
from dit_jax.training import ema
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.state import make_state


def power_average(history, gamma):
    """The average with weights tau^gamma over history[0], ..., as the recursion defines it, in float64."""
    average = np.zeros_like(history[0], np.float64)
    for t, value in enumerate(history, start=1):
        beta = (1 - 1 / t) ** (gamma + 1)
        average = beta * average + (1 - beta) * value
    return average


def test_all_averages_follow_their_recursions(tiny):
    config = tiny.config(optim={"ema_decay": 0.5, "ema_more": (0.9,), "ema_sigma_rel": (0.05, 0.2)})
    state = make_state({"w": {"bias": jnp.zeros(3)}}, make_optimizer(config), config)
    assert len(state.ema) == power.num_averages(config.optim) == 4
    rng = np.random.default_rng(0)
    history = rng.normal(size=(50, 3))
    averages = [jnp.zeros(3)] * 4
    for n, value in enumerate(history):
        rates = ema.rates(config.optim, jnp.asarray(n))
        averages = [
            ema.update(a, jnp.asarray(value, jnp.float32), r) for a, r in zip(averages, rates, strict=True)
        ]
    for average, decay in zip(averages[:2], (0.5, 0.9), strict=True):
        expected = np.zeros(3)
        for n, value in enumerate(history):
            d = min(decay, (1 + n) / (10 + n))
            expected = d * expected + (1 - d) * value
        np.testing.assert_allclose(average, expected, rtol=1e-4, atol=1e-6)
    for average, width in zip(averages[2:], (0.05, 0.2), strict=True):
        expected = power_average(history, power.sigma_rel_to_gamma(width))
        np.testing.assert_allclose(average, expected, rtol=1e-4, atol=1e-6)


WIDTHS = (0.02, 0.1, 0.25)


@pytest.mark.parametrize("updates", [0, 1, 10**3, 3 * 10**6, 10**7, 2**24 + 1, 2**31 - 1])
def test_rates_are_right_however_late(tiny, updates):
    config = tiny.config(optim={"ema_decay": 0.9999, "ema_more": (0.999999,), "ema_sigma_rel": WIDTHS}).optim
    n = np.float64(updates)
    exact = [1 - min(decay, (1 + n) / (10 + n)) for decay in (0.9999, 0.999999)]
    with np.errstate(divide="ignore"):
        exact += [
            -np.expm1((power.sigma_rel_to_gamma(width) + 1) * np.log1p(-1 / (n + 1))) for width in WIDTHS
        ]
    np.testing.assert_allclose(ema.rates(config, jnp.asarray(updates)), exact, rtol=1e-6)
    np.testing.assert_allclose(ema.decays(config, jnp.asarray(updates)), 1 - np.asarray(exact), atol=1e-7)


def test_a_late_average_moves_as_far_as_in_float64(tiny):
    """20,000 updates around the seven millionth, from an average of 0 to parameters of 1."""
    config = tiny.config(optim={"ema_sigma_rel": WIDTHS}).optim
    first, count = 7 * 10**6, 20_000

    @jax.jit
    def run(averages):
        def one(averages, n):
            rates = ema.rates(config, n)
            return tuple(ema.update(a, 1.0, r) for a, r in zip(averages, rates, strict=True)), None

        return jax.lax.scan(one, averages, first + jnp.arange(count))[0]

    found = run((jnp.zeros(()),) * 4)[1:]
    gammas = np.asarray([power.sigma_rel_to_gamma(width) for width in WIDTHS])
    # The product of all decays telescopes: what is left of the start.
    left = np.exp((gammas + 1) * (np.log(first) - np.log(first + count)))
    np.testing.assert_allclose(found, 1 - left, rtol=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.25])
def test_gamma_gives_the_width(sigma_rel):
    gamma = power.sigma_rel_to_gamma(sigma_rel)

    def moment(k):  # of the weights (gamma + 1) tau^gamma on [0, 1]
        return quad(lambda tau: (gamma + 1) * tau ** (gamma + k), 0, 1)[0]

    assert np.sqrt(moment(2) - moment(1) ** 2) == pytest.approx(sigma_rel, rel=1e-6)


def test_published_exponents():
    # EDM2, section 3.1: gamma 16.97 and 6.94 for widths of 5% and 10%.
    assert power.sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert power.sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=0.005)


def test_product_of_weights_is_their_integral():
    for t_a, a, t_b, b in [(3, 2, 5, 4), (5, 2, 3, 4), (4, 16.97, 4, 6.94), (2, 7, 9, 1)]:
        integral = quad(
            lambda x, a=a, b=b, t_a=t_a, t_b=t_b: (a + 1) * x**a / t_a ** (a + 1) * (b + 1) * x**b / t_b ** (b + 1),
            0, min(t_a, t_b),
        )[0]  # fmt: skip
        assert power.profile_product(t_a, a, t_b, b) == pytest.approx(integral, rel=1e-8)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """(workdir with snapshots of a made-up history, the history of one scalar, config)."""
    config = tiny.config(optim={"ema_sigma_rel": (0.05, 0.1)}, train={"snapshot_every": 250})
    workdir = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    history = np.cumsum(rng.normal(size=2000) * 0.1) + np.sin(np.arange(2000) / 300)
    params = {"final_linear": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
    state = make_state(params, make_optimizer(config), config)
    averages = [0.0, 0.0]
    rates = np.asarray(
        jax.vmap(lambda n: jnp.stack(ema.rates(config.optim, n)[1:]))(jnp.arange(2000)), np.float64
    )
    with Snapshots(workdir, config, 0) as snapshots:
        for t, value in enumerate(history, start=1):
            averages = [a + r * (value - a) for a, r in zip(averages, rates[t - 1], strict=True)]
            if t % 250 == 0:
                trees = tuple(jax.tree.map(lambda x, v=v: jnp.full_like(x, v), params) for v in averages)
                now = dataclasses.replace(state, step=jnp.asarray(t), ema=(params, *trees))
                snapshots.save(now, t)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (workdir / "dataset.json").write_text("{}")
    return workdir, history, config


@pytest.mark.parametrize("sigma_rel", [0.06, 0.075, 0.15, 0.2])
def test_a_combination_of_many_snapshots_is_the_direct_average(sigma_rel):
    history = np.cumsum(np.random.default_rng(1).normal(size=4000)) * 0.1
    gammas = [power.sigma_rel_to_gamma(width) for width in (0.05, 0.1)]
    times = [t for t in range(100, 4001, 100) for _ in gammas]
    stored = [power_average(history[:t], g) for t in range(100, 4001, 100) for g in gammas]
    coefficients = power.combination(times, gammas * 40, 4000, power.sigma_rel_to_gamma(sigma_rel))
    expected = power_average(history, power.sigma_rel_to_gamma(sigma_rel))
    assert coefficients @ stored == pytest.approx(expected, abs=3e-3 * history.std())


@pytest.mark.parametrize("sigma_rel", [0.05, 0.075, 0.1])
def test_any_width_after_training(trained, sigma_rel):
    workdir, history, _ = trained
    params, step = reconstruct(workdir, sigma_rel)
    assert step == 2000
    expected = power_average(history, power.sigma_rel_to_gamma(sigma_rel))
    tolerance = 1e-5 if sigma_rel in (0.05, 0.1) else 0.02 * history.std()  # eight snapshots
    np.testing.assert_allclose(params["final_linear"]["kernel"], np.full((2, 2), expected), atol=tolerance)


def test_the_average_can_end_earlier(trained):
    workdir, history, _ = trained
    params, step = reconstruct(workdir, 0.08, step=1500)
    expected = power_average(history[:1500], power.sigma_rel_to_gamma(0.08))
    assert step == 1500
    np.testing.assert_allclose(
        params["final_linear"]["bias"], np.full(2, expected), atol=0.02 * history.std()
    )


def test_the_command_writes_a_folder_to_sample_from(trained, tmp_path, capsys):
    workdir, history, _ = trained
    out = tmp_path / "out"
    main(SnapshotArgs(str(workdir), 0.1, str(out)))
    assert json.loads(capsys.readouterr().out)["step"] == 2000
    config = from_json((out / "config.json").read_text())
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        "final_linear": {
            "kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32, sharding=sharding),
            "bias": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=sharding),
        }
    }
    expected = power_average(history, power.sigma_rel_to_gamma(0.1))
    for kind in ("ema", "params"):
        params, step = load_weights(out / "checkpoints", like, config, kind)
        assert step == 2000
        np.testing.assert_allclose(params["final_linear"]["bias"], np.full(2, expected), rtol=1e-5)


def test_reconstruction_errors(trained, tmp_path):
    workdir, _, _ = trained
    with pytest.raises(CheckpointError, match="has no snapshots"):
        reconstruct(tmp_path, 0.1)
    with pytest.raises(ConfigError, match=r"--step is 3; .* has snapshots of 250, 500"):
        reconstruct(workdir, 0.1, 3)
    with pytest.raises(ConfigError, match=r"--sigma-rel is 0\.4"):
        reconstruct(workdir, 0.4)


def test_a_resumed_run_writes_later_snapshots_again(trained):
    workdir, _, config = trained
    with Snapshots(workdir, config, 1750):
        pass
    assert reconstruct(workdir, 0.1)[1] == 1750
