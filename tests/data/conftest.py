"""A fake encoder and a small source: a VAE's shapes without a VAE's work; a disk of a few hundred KB."""

import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.data.encoders import Encoder, compile_encode
from dit_jax.data.sources import ArraySource

FACTOR = 4
CHANNELS = 2


def _encode(scale, images):
    """(B, S, S, 3) -> mean and std (B, S/4, S/4, 2): block means of red and green, a smaller copy as std."""
    b, s, _, _ = images.shape
    blocks = images.reshape(b, s // FACTOR, FACTOR, s // FACTOR, FACTOR, 3).mean(axis=(2, 4))
    mean = scale * blocks[..., :CHANNELS]
    return mean, 0.1 + 0.01 * jnp.abs(mean)


def make_encoder(**changes) -> Encoder:
    """An encoder with factor 4 and two channels; its scale is 3."""
    facts = {
        "vae": "fake", "vae_hash": "f" * 64, "backend": "flax", "precision": "float32", "scaling_factor": 0.5,
        "shift_factor": 0.25, "factor": FACTOR, "channels": CHANNELS, "devices": jax.local_device_count(),
        "compile": compile_encode(_encode, jnp.float32(3.0)),
    }  # fmt: skip
    return Encoder(**(facts | changes))


def make_source(count=50, size=16, classes=5, seed=0) -> ArraySource:
    """Random images with labels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return ArraySource(
        "random", images, rng.integers(0, classes, count), tuple(f"class {i}" for i in range(classes))
    )


def expected_moments(source, mirrors=True, dtype=np.float16) -> np.ndarray:
    """What should be stored of an array source: (N, M, h, w, 2c)."""
    images = source.images.astype(np.float32) / 127.5 - 1
    views = (images, images[:, :, ::-1]) if mirrors else (images,)
    return np.stack([np.concatenate(_encode(3.0, view), axis=-1) for view in views], axis=1).astype(dtype)


@pytest.fixture(scope="session")
def fake_encoder():
    """A function that makes an Encoder; keywords replace its facts."""
    return make_encoder


@pytest.fixture(scope="session")
def random_source():
    """A function (count, size, classes, seed) that makes a source of random images."""
    return make_source


@pytest.fixture(scope="session")
def moments_of():
    """A function (source, mirrors, dtype) that gives what a dataset of it should hold."""
    return expected_moments


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, and a function that makes the disk so large (such as "300k")."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a tmpfs, as root has it: {error}")

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)

    yield folder, resize
    subprocess.run(["umount", "-l", folder], check=True)
