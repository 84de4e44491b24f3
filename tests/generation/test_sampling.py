"""Samples are a function of (seed, index, label) alone, and bad requests are refused before any work."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dit_jax.conditions import label_numbers
from dit_jax.config import ComputeConfig, Config, ConfigError, DiffusionConfig, ModelConfig, resolve
from dit_jax.generation.sampling import (
    SamplingOptions,
    check_sampling,
    generate_images,
    load_decoder,
    make_decoder,
    make_latent_sampler,
    sampling_model,
)
from dit_jax.interop.diffusers import load_autoencoder_kl
from dit_jax.models.compute import unrolls
from dit_jax.models.create import build_model

CONFIG = resolve(
    Config(
        model=ModelConfig(
            depth=1,
            hidden_size=32,
            num_heads=2,
            patch_size=2,
            input_size=(4, 4),
            in_channels=4,
            num_classes=10,
        ),
        diffusion=DiffusionConfig(num_timesteps=100, prediction="x0"),  # keeps an untrained network in range
    )
)
OPTIONS = SamplingOptions(sampler="ddpm", steps=4, cfg_scale=1.5)


def one_device():
    return Mesh(np.array(jax.devices()[:1]), ("data",))


@pytest.fixture(scope="module")
def model_and_params():
    model = build_model(CONFIG)
    x, t = jnp.zeros((1, 4, 4, 4)), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t, t)["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda s: jnp.asarray(0.1 * rng.normal(size=s.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def all_latents(model_and_params):
    """24 samples drawn as one batch on one device."""
    model, params = model_and_params
    sampler = make_latent_sampler(model, CONFIG, OPTIONS, one_device())
    return np.asarray(sampler(params, 3, np.arange(24, dtype=np.int32), np.arange(24, dtype=np.int32) % 10))


def test_samples_are_finite_and_differ(all_latents):
    assert all_latents.shape == (24, 4, 4, 4)
    assert np.isfinite(all_latents).all()
    assert np.abs(all_latents[0] - all_latents[10]).max() > 0.1  # same label, another index


def test_sample_17_is_the_same_alone_and_in_a_batch(model_and_params, all_latents):
    model, params = model_and_params
    sampler = make_latent_sampler(model, CONFIG, OPTIONS, one_device())
    alone = sampler(params, 3, np.array([17], np.int32), np.array([7], np.int32))
    np.testing.assert_allclose(alone[0], all_latents[17], atol=1e-5)
    other_seed = sampler(params, 4, np.array([17], np.int32), np.array([7], np.int32))
    assert np.abs(other_seed[0] - all_latents[17]).max() > 0.1


def test_sample_17_is_the_same_on_eight_devices(model_and_params, all_latents):
    model, params = model_and_params
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    sampler = make_latent_sampler(model, CONFIG, OPTIONS, mesh)
    indices = np.arange(24, dtype=np.int32)
    np.testing.assert_allclose(sampler(params, 3, indices, indices % 10), all_latents, atol=1e-5)


def test_guidance_by_another_network_by_schedule_and_rescaled(model_and_params, all_latents):
    """Each changes the samples; a guide that is the network itself changes nothing, whatever the scale."""
    model, params = model_and_params
    indices = np.arange(4, dtype=np.int32)
    options = dataclasses.replace(OPTIONS, cfg_scale=4.0)

    def latents(options, guide=None, params=params):
        sampler = make_latent_sampler(model, CONFIG, options, one_device(), guide=guide)
        return np.asarray(sampler(params, 3, indices, indices))

    plain, unguided = latents(options), latents(dataclasses.replace(options, cfg_scale=1.0))
    for changed in (dict(schedule="cosine"), dict(schedule="linear"), dict(rescale=1.0)):
        found = latents(dataclasses.replace(options, **changed))
        assert np.isfinite(found).all() and np.abs(found - plain).max() > 1e-2, changed
    np.testing.assert_allclose(latents(options, model, (params, params)), unguided, atol=1e-3)
    weaker = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    assert np.abs(latents(options, model, (params, weaker)) - unguided).max() > 1e-2


def test_a_network_trained_in_8_bits_is_sampled_without(model_and_params):
    model, params = model_and_params
    sampler = make_latent_sampler(model.computed(quantization="fp8"), CONFIG, OPTIONS, one_device())
    index = np.zeros(1, np.int32)
    assert "f8E4M3" not in sampler.lower(params, 3, index, index).as_text()


def test_pictures_do_not_depend_on_the_batch_size(model_and_params):
    model, params = model_and_params
    vae, vae_params = load_autoencoder_kl("digits")
    decoder = make_decoder(vae, vae_params, 1.0, 0.0)
    labels = np.arange(11) % 10
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    whole = generate_images(model, params, CONFIG, OPTIONS, labels, decoder, mesh, seed=3)
    parts = generate_images(model, params, CONFIG, OPTIONS, labels, decoder, mesh, seed=3, batch_size=4)
    assert whole.shape == (11, 16, 16, 3) and whole.dtype == np.uint8
    assert np.abs(whole.astype(int) - parts.astype(int)).max() <= 1
    assert whole.std() > 1
    sampler = make_latent_sampler(model, CONFIG, OPTIONS, one_device())
    one = sampler(params, 3, np.array([7], np.int32), np.array([labels[7]], np.int32))
    assert np.abs(decoder(np.asarray(one))[0].astype(int) - whole[7].astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        ({"steps": 1}, [0], "--steps is 1; expected 2 to 100"),
        ({"steps": 101}, [0], "--steps is 101; expected 2 to 100"),
        ({"eta": -0.1}, [0], "--eta is -0.1; expected 0 or more"),
        ({"eta": 30.0}, [0], "--eta is 30.0; expected 0 or more, and no step to add more"),
        ({"eta": float("nan")}, [0], "--eta is nan"),
        ({"channels": 0}, [0], "--cfg-channels is 0; expected all, or 1 to 4"),
        ({"channels": 5}, [0], "--cfg-channels is 5; expected all, or 1 to 4"),
        ({"interval": (700, 100)}, [0], r"--cfg-interval is \(700, 100\); expected the lowest"),
        ({"cfg_scale": float("inf")}, [0], "--cfg-scale is inf; expected a finite number"),
        ({}, [0, 10], "--labels names class 10; expected 0 to 9"),
        ({}, [], "--num-samples is 0"),
    ],
)
def test_bad_requests_are_refused(options, labels, message):
    with pytest.raises(ConfigError, match=message):
        check_sampling(build_model(CONFIG), CONFIG, SamplingOptions(**options), np.asarray(labels, np.int32))


def test_guidance_needs_a_null_label():
    plain = build_model(CONFIG).clone(class_dropout_prob=0.0)
    with pytest.raises(ConfigError, match=r"--cfg-scale is 1.5; expected 1"):
        check_sampling(plain, CONFIG, OPTIONS, np.zeros(1, np.int32))
    check_sampling(plain, CONFIG, SamplingOptions(cfg_scale=1.0), np.zeros(1, np.int32))


def test_labels_go_by_number_or_name():
    names = ("cat", "dog", "7")
    np.testing.assert_array_equal(label_numbers(["dog", "0", "7"], names, 3), [1, 0, 2])
    np.testing.assert_array_equal(label_numbers([], names, 3), [0, 1, 2])
    with pytest.raises(
        ConfigError, match="--labels names 'cow'; expected a class number or one of: cat, dog, 7"
    ):
        label_numbers(["cow"], names, 3)
    for name in ("3", "99999999999"):
        with pytest.raises(ConfigError, match=f"--labels names class {name}; expected 0 to 2"):
            label_numbers([name], names, 3)
    with pytest.raises(ConfigError, match="--labels names '²'"):
        label_numbers(["²"], names, 3)


def test_labels_that_may_mean_two_classes_are_refused():
    numbers = ("1", "10", "2")  # folders of such names, in the order of names
    for label, classes in (("1", "0 or 1"), ("2", "2"), ("10", "1"), ("0", "0")):
        if "or" not in classes:
            assert label_numbers([label], numbers, 3) == [int(classes)]
            continue
        with pytest.raises(
            ConfigError, match=f"'{label}', which may be class {classes} .*; expected number:0 or number:1"
        ):
            label_numbers([label], numbers, 3)
    assert label_numbers(["number:1", "number:0"], numbers, 3).tolist() == [1, 0]
    with pytest.raises(ConfigError, match="'crane', which may be class 0 or 2"):
        label_numbers(["crane"], ("crane", "owl", "crane"), 3)
    with pytest.raises(ConfigError, match="--labels names class 7; expected 0 to 2"):
        label_numbers(["number:7"], numbers, 3)
    assert label_numbers(["number:1"], ("a", "b", "number:1"), 3) == [2]


def test_a_run_trained_with_a_gpus_kernels_is_sampled_without_a_gpu(model_and_params):
    trained = ComputeConfig(attention="cudnn", norm_kernel="pallas", dtype="bfloat16")
    plain = ComputeConfig(dtype="bfloat16")
    x, t = jnp.ones((1, 4, 4, 4)), jnp.ones(1, jnp.int32)
    found, expected = (
        sampling_model(dataclasses.replace(CONFIG, compute=compute)).apply(
            {"params": model_and_params[1]}, x, t, t
        )
        for compute in (trained, plain)
    )
    np.testing.assert_array_equal(found, expected)


def test_an_autoencoder_out_of_reach_is_named(tmp_path):
    metadata = collections.namedtuple("Metadata", "vae")(str(tmp_path / "moved"))
    with pytest.raises(ConfigError, match=r"autoencoder cannot be read: .*moved' is not a folder"):
        load_decoder(metadata)
    (tmp_path / "moved").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read: .*expected config\.json and"):
        load_decoder(metadata)


def test_wide_layers_unroll_by_themselves_where_one_cpu_device_samples(monkeypatch):
    one, two = one_device(), Mesh(np.array(jax.devices()[:2]), ("data",))
    assert unrolls("auto", 384, one) and unrolls(True, 128, two)
    assert not (unrolls("auto", 128, one) or unrolls("auto", 384, two) or unrolls(False, 384, one))

    def loops(unroll, width):
        monkeypatch.setattr("dit_jax.models.compute.UNROLLED_WIDTH", width)
        model = dataclasses.replace(CONFIG.model, depth=3)
        config = dataclasses.replace(CONFIG, model=model, compute=ComputeConfig(unroll=unroll))
        options = SamplingOptions(steps=5 + width)  # programs are kept by their arguments
        network = build_model(config)
        shapes = jax.eval_shape(
            network.init, jax.random.key(0), jnp.zeros((1, 4, 4, 4)), jnp.zeros(1), jnp.zeros(1, int)
        )
        sampler = make_latent_sampler(network, config, options, one)
        numbers = np.zeros(1, np.int32)
        return sampler.lower(shapes["params"], 0, numbers, numbers).as_text().count("stablehlo.while")

    assert loops("auto", 32) == loops(True, 33) == loops("auto", 33) - 1 == loops(False, 32) - 1


def test_any_sampler_of_the_table_is_at_hand(model_and_params):
    """Those of one process share what this needs: the latents are finite and the count is told."""
    model, params = model_and_params
    labels = np.arange(2, dtype=np.int32)
    for name, evaluations in (("dpmpp_2m", 6), ("heun", 11), ("dpmpp_2m_sde", 6)):
        options = SamplingOptions(sampler=name, steps=6, grid="karras", cfg_scale=2.0)
        counts = []
        images = generate_images(
            model, params, CONFIG, options, labels, lambda latents: latents, one_device(), told=counts.append
        )
        assert counts == [evaluations] and np.isfinite(images).all() and images.std() > 0.01


def test_the_adaptive_sampler_takes_guided_labels(model_and_params):
    pytest.importorskip("diffrax", reason="needs diffrax")
    model, params = model_and_params
    options = SamplingOptions(sampler="dopri5", cfg_scale=1.5)
    sampler = make_latent_sampler(model, CONFIG, options, one_device(), True)
    labels = np.array([3, 7], np.int32)
    both, count = sampler(params, 3, np.arange(2, dtype=np.int32), labels)
    assert 7 < count < 2000
    alone, _ = sampler(params, 3, np.ones(1, np.int32), labels[1:])
    # Another batch rounds otherwise, which may refuse a step that was taken: 1e-3 is what its tolerance promises.
    np.testing.assert_allclose(both[1:], alone, atol=2e-2)
