"""A run by flow matching: the same trainer and sampler, another kind of process."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dit_jax.config import ConfigError, FlowMatchingConfig, GaussianConfig, resolve
from dit_jax.diffusion.create import create_process
from dit_jax.diffusion.flow import FlowMatching
from dit_jax.diffusion.guidance import classifier_free_guidance
from dit_jax.diffusion.samplers import sample_keys, start_noise
from dit_jax.generation.sampling import SamplingOptions, check_sampling, make_latent_sampler
from dit_jax.interop.official import params_from_state_dict
from dit_jax.models.create import build_model
from dit_jax.runs.log import read_lines
from dit_jax.runs.weights import _warn_of_another_process
from dit_jax.runs.workdir import check_same_run
from dit_jax.samplers.ode import sample_ode
from dit_jax.training.loop import train

FLOW = FlowMatchingConfig(times="logit_normal", logit_mean=-0.4, shift=2.0, cosine_weight=0.1)
LABELS = np.arange(3, dtype=np.int32)


def flow_config(tiny, process=FLOW, **parts):
    return resolve(dataclasses.replace(tiny.config(**parts), diffusion=process))


@pytest.fixture(scope="module")
def run(tiny, latents, tmp_path_factory):
    """(config, last state, folder) of a run of 4 steps that was stopped after 2 and went on."""
    folder = tmp_path_factory.mktemp("flow")

    def config(name, steps):
        return flow_config(
            tiny,
            train={"workdir": str(folder / name), "steps": steps, "log_every": 1},
            data={"dir": str(latents)},
        )

    train(config("parts", 2))
    return config("parts", 4), train(config("parts", 4)), train(config("whole", 4)), folder


def test_it_trains_and_goes_on_to_the_bit(run):
    _, parts, whole, folder = run
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), parts, whole)
    lines = read_lines(folder / "parts" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {"loss", "mse", "cosine"} <= line.keys() and "vb" not in line
        assert any(name.startswith("loss_t") for name in line)
        assert line["loss"] == pytest.approx(line["mse"] + 0.1 * line["cosine"], rel=1e-5)


def latents_of(config, params, sampler=None, labels=LABELS, **options):
    one = Mesh(np.array(jax.devices()[:1]), ("data",))
    chosen = SamplingOptions(sampler, **({"steps": 4, "cfg_scale": 1.5} | options))
    draw = make_latent_sampler(build_model(config), config, chosen, one)
    return np.asarray(draw(params, 0, np.arange(3, dtype=np.int32), labels))


def test_it_is_sampled_by_its_own_samplers(run):
    config, state, *_ = run
    params = jax.device_get(state.params)
    params = jax.tree.map(lambda a: a + 0.02, params)  # after 4 steps the last layer is nearly zero
    euler = latents_of(config, params, "euler")
    model = build_model(config)

    def network(x, t, y):
        return model.apply({"params": params}, x, t, y)

    keys = sample_keys(jax.random.key(0), jnp.arange(3))
    guided = classifier_free_guidance(network, LABELS, model.null_label, 1.5)
    expected = sample_ode(FlowMatching.create(), guided, start_noise(keys, (8, 8, 4)), steps=5)
    np.testing.assert_allclose(euler, expected, atol=2e-5)
    np.testing.assert_array_equal(latents_of(config, params), latents_of(config, params, "unipc_2"))
    others = [latents_of(config, params, name) for name in (None, "heun", "euler_maruyama")]
    for other in others:
        assert np.isfinite(other).all() and np.abs(other - euler).max() > 1e-3


@pytest.mark.parametrize(
    ("process", "options", "message"),
    [
        (FLOW, {"sampler": "ddpm"}, "--sampler is 'ddpm'; expected one of .*euler.* for this process"),
        (FLOW, {"sampler": "euler", "eta": 0.5}, "--eta is 0.5; expected 0 for sampler 'euler'"),
        (FLOW, {"steps": 0}, "--steps is 0; expected"),
        (
            GaussianConfig(),
            {"sampler": "none"},
            "--sampler is 'none'; expected one of .*ddim.* for this process",
        ),
    ],
)
def test_what_does_not_serve_the_process_is_refused(tiny, process, options, message):
    config = flow_config(tiny, process)
    with pytest.raises(ConfigError, match=message):
        check_sampling(build_model(config), config, SamplingOptions(**options), LABELS)


def test_another_process_is_another_run(tiny, capsys):
    ours, theirs = flow_config(tiny), tiny.config()
    message = "--diffusion.kind is 'flow'; the run in here has 'gaussian': go on with the same value"
    with pytest.raises(ConfigError, match=message):
        check_same_run(ours, theirs, "here")
    check_same_run(ours, flow_config(tiny), "here")
    _warn_of_another_process(ours, theirs)
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ConfigError, match=r"--diffusion.shift is 3.0; the run in here has 2.0"):
        check_same_run(flow_config(tiny, dataclasses.replace(FLOW, shift=3.0)), ours, "here")


def test_every_option_reaches_the_process():
    config = FlowMatchingConfig(
        "gvp", "noise", "likelihood", 0.5, "mode", 0.1, 0.7, 0.9, 3.0, 1000.0, "to_noise", 0.01, 0.02
    )
    process = create_process(config)
    assert isinstance(process, FlowMatching)
    assert (process.path, process.prediction, process.loss_weight) == ("gvp", "noise", "likelihood")
    assert (process.cosine_weight, process.time_scale, process.time_direction) == (0.5, 1000.0, "to_noise")
    assert (process.train_eps, process.sample_eps) == (0.01, 0.02)
    times = process.times
    assert (times.kind, times.mean, times.std, times.mode_scale, times.shift) == ("mode", 0.1, 0.7, 0.9, 3.0)
    assert create_process(FlowMatchingConfig()) == FlowMatching.create()
    assert create_process(FlowMatchingConfig("vp")) == FlowMatching.create("vp")  # SiT's margins


def test_the_dead_half_of_a_published_sit_is_loaded_and_never_read(tiny, sit):
    settings = {k.removeprefix("config/"): v.item() for k, v in sit.items() if k.startswith("config/")}
    state = {k.removeprefix("params/"): v for k, v in sit.items() if k.startswith("params/")}
    assert settings.pop("learn_sigma")
    size = settings.pop("input_size")
    config = flow_config(
        tiny,
        FlowMatchingConfig(learn_sigma=True),
        model={**settings, "mlp_ratio": 4.0, "input_size": (size, size)},
    )
    params = params_from_state_dict(state, build_model(config))
    found = latents_of(config, params, cfg_scale=1.0)
    # (P * P * 2C) outputs of the last layer, the channel innermost: the second half of them is dead.
    channels = config.model.in_channels
    last = params["final_linear"]["kernel"]
    kernel = np.array(last).reshape(last.shape[0], -1, 2 * channels)
    kernel[..., channels:] += 1.0
    other = {**params, "final_linear": {**params["final_linear"], "kernel": kernel.reshape(last.shape)}}
    np.testing.assert_array_equal(found, latents_of(config, other, cfg_scale=1.0))
    kernel[..., :channels] += 1.0
    other["final_linear"]["kernel"] = kernel.reshape(last.shape)
    assert np.abs(found - latents_of(config, other, cfg_scale=1.0)).max() > 1e-3
