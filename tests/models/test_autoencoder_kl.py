"""The autoencoder's config, shapes, precision and input checks; parity is tested in tests/interop."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, from_latents, to_latents

TINY = AutoencoderKLConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3)


@pytest.fixture(scope="module")
def params():
    return jax.jit(AutoencoderKL(TINY).init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]


def test_shapes_of_non_square_images(params):
    model = AutoencoderKL(TINY)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    mean, std = model.apply({"params": params}, images, method="encode")
    assert model.downsample_factor == 2
    assert mean.shape == std.shape == (2, 4, 6, 3)
    assert (std > 0).all()
    assert model.apply({"params": params}, mean, method="decode").shape == images.shape


def test_bfloat16_computes_close_to_float32_and_returns_float32(params):
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    full = AutoencoderKL(TINY).apply({"params": params}, images)
    half = AutoencoderKL(TINY, jnp.bfloat16).apply({"params": params}, images)
    assert half.dtype == jnp.float32
    relative = np.linalg.norm(half - full) / np.linalg.norm(full)
    assert 1e-5 < relative < 3e-2  # bfloat16 was used, and no more was lost than its 8 bits


@pytest.mark.parametrize(
    ("asked", "encoded", "decoded"), [(None, "DEFAULT", "HIGH"), ("highest", "HIGHEST", "HIGHEST")]
)
def test_the_decoder_takes_more_than_an_accelerators_default_precision(params, asked, encoded, decoded):
    model, images, z = AutoencoderKL(TINY), jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 2, 2, 3))

    def precisions(method, x):
        text = jax.jit(lambda x: model.apply({"params": params}, x, method=method)).lower(x).as_text()
        return set(re.findall(r"precision[^>]*?<?(HIGHEST|HIGH|DEFAULT)\b", text))

    with jax.default_matmul_precision(asked):
        assert precisions("encode", images) == {encoded}
        assert precisions("decode", z) == {decoded}


@pytest.mark.parametrize(("logvar", "expected"), [(-100.0, -30.0), (100.0, 20.0), (1.0, 1.0)])
def test_log_variance_is_clamped(params, logvar, expected):
    quant = {"kernel": jnp.zeros((1, 1, 6, 6)), "bias": jnp.full((6,), logvar)}
    images = jnp.zeros((1, 4, 4, 3))
    _, std = AutoencoderKL(TINY).apply({"params": {**params, "quant_conv": quant}}, images, method="encode")
    np.testing.assert_allclose(std, np.exp(0.5 * expected), rtol=1e-6)


def test_latent_scaling_is_stable_diffusion_3s_and_inverts():
    z = np.random.default_rng(0).standard_normal((2, 4, 4, 16)).astype(np.float32)
    latents = to_latents(z, 1.5305, 0.0609)
    np.testing.assert_allclose(latents, (z - 0.0609) * 1.5305, rtol=1e-6)
    np.testing.assert_allclose(from_latents(latents, 1.5305, 0.0609), z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_latents(z, 0.18215), z * 0.18215, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 8, 8, 1), (1, 7, 8, 3)])
def test_wrong_images_are_refused(params, shape):
    with pytest.raises(ValueError, match=r"images have shape .* expected"):
        AutoencoderKL(TINY).apply({"params": params}, jnp.zeros(shape), method="encode")


def test_wrong_latents_are_refused(params):
    with pytest.raises(ValueError, match=r"latents have shape \(1, 4, 4, 4\); expected .*3\)"):
        AutoencoderKL(TINY).apply({"params": params}, jnp.zeros((1, 4, 4, 4)), method="decode")


def test_config_round_trip():
    config = AutoencoderKLConfig(
        block_out_channels=(32, 64, 64), layers_per_block=2, latent_channels=16, shift_factor=0.0609,
        use_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    assert AutoencoderKLConfig.from_json(config.to_json()) == config
    assert config.downsample_factor == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'.*'silu'"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"latent_channels": "4"}, "latent_channels is '4'.*int"),
        ({"layers_per_block": True}, "layers_per_block"),
        ({"latent_channels": 0}, "latent_channels is 0.*above 0"),
        ({"block_out_channels": [48, 100]}, "block_out_channels.*multiples of norm_num_groups 32"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types.*DownEncoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "_class_name is 'AsymmetricAutoencoderKL'"),
    ],
)
def test_a_config_that_is_not_covered_names_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLConfig.from_json(json.dumps({"block_out_channels": [64], **changes}))


def test_notes_in_a_config_are_ignored():
    text = json.dumps({"_diffusers_version": "0.4.2", "_note": 1, "sample_size": 512, "force_upcast": True})
    assert AutoencoderKLConfig.from_json(text) == AutoencoderKLConfig()
