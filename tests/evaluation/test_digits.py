"""The referee on real digits, and what the shipped autoencoder does to them."""

import jax
import numpy as np
import pytest

from dit_jax.data import digits
from dit_jax.evaluation.digits import class_agreement, fit_referee, pixel_frechet
from dit_jax.interop.diffusers import asset_path, load_autoencoder_kl


@pytest.fixture(scope="module")
def referee():
    return fit_referee()


@pytest.fixture(scope="module")
def decoded():
    """The shipped autoencoder's latents of the test split, pictures decoded from them and from perturbed ones."""
    model, params = load_autoencoder_kl("digits")
    images, labels = digits.load_digits("test")
    encode = jax.jit(lambda x: model.apply({"params": params}, x, method="encode"))
    decode = jax.jit(lambda z: model.apply({"params": params}, z, method="decode"))
    mean, std = encode(images / np.float32(127.5) - 1)
    noise = np.random.default_rng(0).standard_normal(mean.shape, np.float32)
    pictures = [
        np.clip(127.5 * np.asarray(decode(z)) + 128, 0, 255).astype(np.uint8)
        for z in (mean, mean + std * noise, mean + 0.2 * noise)
    ]
    latents = np.asarray(mean + std * noise) * model.config.scaling_factor
    return images, labels, latents, pictures


def test_referee_reads_real_digits(referee):
    assert referee.score(*digits.load_originals("test")) >= 0.985
    assert class_agreement(referee, *digits.load_digits("test")) >= 0.985


def test_class_agreement_counts(referee):
    images, labels = digits.load_digits("test")
    right = referee.predict(digits.to_8x8(images)) == labels
    wrong = np.where(np.arange(len(labels)) < 100, (labels + 1) % 10, labels)
    assert class_agreement(referee, images, wrong) < right.mean() - 0.9 * 100 / len(labels)
    with pytest.raises(ValueError, match="364 images and 2 labels"):
        class_agreement(referee, images, labels[:2])


def test_reconstructions_keep_their_class(referee, decoded):
    images, labels, _, pictures = decoded
    for name, found in zip(("mean", "posterior sample", "mean + 0.2 noise"), pictures, strict=True):
        assert class_agreement(referee, found, labels) >= 0.98, name
        np.testing.assert_array_equal(found[..., 0], found[..., 1])  # exactly gray
    assert np.abs(pictures[0].astype(float) - images).mean() < 4  # of 255


def test_scaled_latents_are_standardised(decoded):
    latents = decoded[2]
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0, atol=0.05)
    np.testing.assert_allclose(latents.std((0, 1, 2)), 1, atol=0.05)


def test_frechet_distance_tells_digits_from_noise(decoded):
    images, _, _, (reconstructed, *_) = decoded
    train = pixel_frechet(digits.load_digits("train")[0])
    assert pixel_frechet(reconstructed) < train  # nearer to their originals than other real digits are
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    assert pixel_frechet(noise) > 50 * train


def test_asset_is_small():
    assert sum(file.stat().st_size for file in asset_path("digits_vae").iterdir()) < 1_000_000
