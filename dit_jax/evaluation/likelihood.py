"""How likely a run's network finds latents of pictures that it was not trained on.

Letters: N latents, B of them at once, H and W their sides, C their channels.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from dit_jax import paths
from dit_jax.conditions import condition_of
from dit_jax.config import Config, ConfigError, run_config
from dit_jax.data.latents import LatentDataset, draw_latents
from dit_jax.data.metadata import LatentMetadata, load_metadata
from dit_jax.diffusion.create import create_process
from dit_jax.models.create import build_model, init_params
from dit_jax.runs.weights import load_weights
from dit_jax.runs.workdir import read_metadata
from dit_jax.samplers.likelihood import bits_per_dimension, log_likelihood
from dit_jax.samplers.noise import sample_keys

Array = jax.Array
Batch = dict[str, np.ndarray]


def report(
    workdir: str, data: str | None, count: int, steps: int, batch_size: int = 32, seed: int = 0
) -> str:
    """Bits per dimension of the first `count` latents, given their classes, as text.

    data: a folder made by prepare.py with the run's autoencoder; None: the test split of a run on the digits.
    Raises ConfigError for what is no run's folder, data that does not fit, and numbers out of range.
    """
    for option, value, least in (
        ("--count", count, 2),
        ("--steps", steps, 2),
        ("--batch-size", batch_size, 1),
    ):
        if not least <= value < 2**31:
            raise ConfigError(f"{option} is {value}; expected {least} to {2**31 - 1}")
    folder = paths.to_path(workdir)
    config, metadata = run_config("--workdir", folder), read_metadata("--workdir", folder)
    held_out = _digits(config, metadata, count) if data is None else _prepared(data, config, metadata, count)
    bits = np.concatenate(list(_bits(config, metadata, folder, held_out, steps, batch_size, seed)))
    h, w, c = metadata.latent_shape
    error = bits.std(ddof=1) / math.sqrt(len(bits))
    # Of one dataset's run it goes without saying.
    which = " of the digits' test split" if data is None and config.data.mixture else ""
    return (
        f"{bits.mean():.4f} bits per dimension of {len(bits)} latents{which} ({h}x{w}x{c}), standard error "
        f"{error:.4f},\n"
        f"by the probability-flow ODE in {steps} steps of two evaluations, one probe for each latent's divergence"
    )


def _bits(
    config: Config, metadata: LatentMetadata, folder: pathlib.Path, held_out: Batch, steps: int, batch_size: int,
    seed: int,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Bits per dimension of one batch after the other, (b,)."""
    model, process = build_model(config).plain().computed(remat="none"), create_process(config.diffusion)
    whole = NamedSharding(Mesh(np.array(jax.local_devices()[:1]), ("data",)), PartitionSpec())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(lambda key: init_params(model, config, key), jax.random.key(0)),
    )
    params, _ = load_weights(folder / "checkpoints", like, config)

    @jax.jit
    def bits(params: Any, batch: dict[str, Array], indices: Array) -> Array:
        keys = sample_keys(jax.random.key(seed), indices)
        one = {name: values[:, None] for name, values in batch.items()}
        x0 = jax.vmap(
            lambda record, key: draw_latents(
                record, jax.random.fold_in(key, 1), metadata.scaling_factor, metadata.shift_factor, False
            )[0]
        )(one, keys)
        condition = model.condition.of(batch)
        denoise: Any = lambda x, t: model.apply({"params": params}, x, t, condition)  # noqa: E731
        found = log_likelihood(process, denoise, x0, keys, steps=steps)
        return bits_per_dimension(found, math.prod(x0.shape[1:]))

    count = len(held_out["moments"])
    with tqdm(total=count, unit="latent") as bar:
        for start in range(0, count, batch_size):
            indices = np.arange(start, start + batch_size, dtype=np.int32)
            rows, part = np.minimum(indices, count - 1), min(batch_size, count - start)
            batch = {name: jnp.asarray(values[rows]) for name, values in held_out.items()}
            yield np.asarray(bits(params, batch, indices))[:part]
            bar.update(part)


def _prepared(data: str, config: Config, metadata: LatentMetadata, count: int) -> Batch:
    """Records of a prepared dataset; ConfigError for one of another autoencoder or shape, or of other captions."""
    kind = condition_of(config)
    kind.check_data(load_metadata(data).stored(kind), f"--data {data}")
    dataset = LatentDataset(data, condition=kind)
    for what in ("vae_hash", "latent_shape", "num_classes"):
        ours, theirs = getattr(metadata, what), getattr(dataset.metadata, what)
        if ours != theirs:
            raise ConfigError(f"--data {data} has {what} {theirs}; expected {ours}, as the run's dataset")
    return dataset.read(np.arange(min(count, len(dataset))))


def _digits(config: Config, metadata: LatentMetadata, count: int) -> Batch:
    """The digits' test split, encoded by the run's autoencoder."""
    from dit_jax.data.digits import load_digits
    from dit_jax.interop.diffusers import load_autoencoder_kl

    if config.data.source != "digits":
        raise ConfigError(
            f"--data is missing and the run's --data.source is {config.data.source!r}; expected a folder of held-out "
            "pictures made by prepare.py"
        )
    pictures, labels = (values[:count] for values in load_digits("test"))
    vae, params = load_autoencoder_kl(metadata.vae)

    @jax.jit
    def encode(params: Any, pictures: Array) -> Array:
        images = pictures.astype(jnp.float32) / 127.5 - 1.0
        moments: Any = vae.apply({"params": params}, images, method="encode")
        return jnp.concatenate(moments, axis=-1)

    return {"moments": np.asarray(encode(params, pictures))[:, None], "label": labels}
