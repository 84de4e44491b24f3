"""A run that can be sampled, made without training: random weights of a tiny network, the digits' autoencoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import (
    Config,
    DiffusionConfig,
    FlowMatchingConfig,
    MMDiTConfig,
    ModelConfig,
    TextConfig,
    resolve,
    to_json,
)
from dit_jax.data.metadata import LatentMetadata
from dit_jax.interop.diffusers import weights_hash
from dit_jax.models.create import build_model, init_params
from dit_jax.runs.weights import save_weights

TINY = resolve(
    Config(
        model=ModelConfig("DiT-S/2", depth=2, hidden_size=32, num_heads=2, input_size=(8, 8), num_classes=10),
        diffusion=DiffusionConfig(num_timesteps=100, prediction="x0"),  # keeps an untrained network in range
    )
)
METADATA = LatentMetadata(
    source="digits/train", source_hash="", source_count=4, vae="digits", vae_hash="", vae_backend="flax",
    precision="float32", scaling_factor=1.0, shift_factor=0.0, latent_shape=(8, 8, 4), image_size=32, crop="",
    mirrors=False, dtype="float16", num_classes=10, label_names=(), shard_size=4, batch_size=4,
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Folder of a run of 2 layers on the digits' latents, with checkpoints of steps 3 and 5."""
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", TINY, (3, 5))


@pytest.fixture(scope="session")
def sd3_run(tmp_path_factory, sd3_folder):
    """Folder of a run of a small MMDiT, told captions by the encoders in `sd3_folder`."""
    config = Config(
        model=MMDiTConfig(
            "MMDiT-2", hidden_size=32, num_heads=2, input_size=(8, 8), in_channels=4, mlp_ratio=2.0
        ),
        text=TextConfig("sd3", length=77 + 16, channels=48, clip_widths=(16, 24)),
        diffusion=FlowMatchingConfig(time_scale=1000, time_direction="to_noise"),
    )
    return make_run(tmp_path_factory.mktemp("runs") / "sd3", resolve(config), (5,))


@pytest.fixture(scope="session")
def bytes_run(tmp_path_factory):
    """Folder of a run of a small DiT with the encoder `bytes`."""
    config = resolve(dataclasses.replace(TINY, text=TextConfig("bytes", length=16)))
    return make_run(tmp_path_factory.mktemp("runs") / "bytes", config, (5,))


def make_run(folder, config, steps):
    """The folder, with random weights of the config's network as checkpoints of these steps."""
    folder.mkdir()
    (folder / "config.json").write_text(to_json(config))
    metadata = dataclasses.replace(METADATA, vae_hash=weights_hash("digits"))
    (folder / "dataset.json").write_text(metadata.to_json())
    model = build_model(config)
    like = jax.eval_shape(lambda key: init_params(model, config, key), jax.random.key(0))
    for step in steps:
        rng = np.random.default_rng(step)
        leaves, tree = jax.tree.flatten(like)
        params = tree.unflatten(
            [jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
        )
        save_weights(folder / "checkpoints", step, params)
    return folder
