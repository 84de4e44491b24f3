"""Make dit_jax/assets/digits_vae, the small autoencoder of the embedded digits.

    python tools/make_digits_vae.py            # a few minutes on two CPU cores

Trains on the digits' training split only, in gray; conv_in and conv_out are then widened so that the shipped
network reads and writes RGB and its pictures are exactly gray. Prints how many reconstructions of the test
split keep their class by the independent referee, and the statistics of the latents.

Legend: N images, Z latent channels.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from dit_jax.data import digits
from dit_jax.evaluation.digits import class_agreement, fit_referee
from dit_jax.interop.diffusers import asset_path, load_autoencoder_kl, save_autoencoder_kl
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

CONFIG = AutoencoderKLConfig(
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 32, 32),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    scaling_factor=1.0,
)
KL_WEIGHT = 1e-2  # per latent value; large enough for smooth latents of about unit spread
EDGE_WEIGHT = 0.5
BATCH = 64


def loss_fn(params, model, images, key):
    """L1 + L2 + L1 of pixel differences (crisp edges) + KL to the unit Gaussian; images (N, 32, 32, 1)."""
    mean, std = model.apply({"params": params}, images, method="encode")
    z = mean + std * jax.random.normal(key, mean.shape)
    error = model.apply({"params": params}, z, method="decode") - images
    edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (1, 2))
    reconstruction = jnp.abs(error).mean() + jnp.square(error).mean() + EDGE_WEIGHT * edges
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * jnp.log(std)).mean()
    return reconstruction + KL_WEIGHT * kl, (reconstruction, kl)


def train(model, images, steps, seed):
    """Parameters after `steps` of Adam with a cosine learning rate, on images (N, 32, 32, 1) in [-1, 1]."""
    params = jax.jit(model.init)(jax.random.key(seed), images[:1])["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 8, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    opt_state = optimizer.init(params)

    @jax.jit
    def update(params, opt_state, step):
        draw, noise = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        batch = images[jax.random.choice(draw, len(images), (BATCH,), replace=False)]
        (_, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, model, batch, noise)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, parts

    for step in (bar := tqdm.trange(steps, desc="training", unit="step")):
        params, opt_state, (reconstruction, kl) = update(params, opt_state, step)
        if step % 50 == 0:
            bar.set_postfix(reconstruction=f"{reconstruction:.4f}", kl=f"{kl:.2f}")
    return jax.device_get(params)


def standardize(params, mean, std):
    """The same network with latents of zero mean and unit spread per channel, by way of the 1x1 convolutions.

    mean, std (N, h, w, Z): the posterior of the training images; the spread is that of posterior samples.
    """
    center = mean.mean(axis=(0, 1, 2))
    spread = np.sqrt(mean.var(axis=(0, 1, 2)) + np.square(std).mean(axis=(0, 1, 2)))
    quant, post = params["quant_conv"], params["post_quant_conv"]
    factor = np.concatenate([1 / spread, np.ones_like(spread)])
    offset = np.concatenate([-center / spread, -2 * np.log(spread)])  # of the mean and of the log variance
    quant = {"kernel": quant["kernel"] * factor, "bias": quant["bias"] * factor + offset}
    post = {"kernel": post["kernel"] * spread[:, None], "bias": post["bias"] + center @ post["kernel"][0, 0]}
    return {**params, "quant_conv": quant, "post_quant_conv": post}


def widen(params):
    """The same network on RGB: it reads the channels' mean and writes equal channels."""
    encoder, decoder = params["encoder"], params["decoder"]
    conv_in = {**encoder["conv_in"], "kernel": np.repeat(encoder["conv_in"]["kernel"], 3, axis=2) / 3}
    conv_out = {name: np.repeat(value, 3, axis=-1) for name, value in decoder["conv_out"].items()}
    return {
        **params,
        "encoder": {**encoder, "conv_in": conv_in},
        "decoder": {**decoder, "conv_out": conv_out},
    }


def report(path):
    """Print the shipped network's figures, measured on what was written."""
    model, params = load_autoencoder_kl(path)
    decode = jax.jit(lambda z: model.apply({"params": params}, z, method="decode"))
    referee = fit_referee()
    images, labels = digits.load_digits("test")
    mean, std = encode(model, params, images / np.float32(127.5) - 1)
    noise = np.random.default_rng(0).standard_normal(mean.shape, np.float32)
    print("decoded test split: share that keeps its class, mean error of 255")
    for name, z in (
        ("posterior mean", mean),
        ("posterior sample", mean + std * noise),
        ("mean + 0.2 noise", mean + 0.2 * noise),
        ("mean + 0.4 noise", mean + 0.4 * noise),
    ):
        decoded = np.asarray(jnp.clip(127.5 * decode(z) + 128, 0, 255)).astype(np.uint8)
        error = np.abs(decoded.astype(float) - images).mean()
        print(f"  {name:17} {class_agreement(referee, decoded, labels):.2%} {error:.2f}")
    real = referee.score(*digits.load_originals("test"))
    print(f"  {'(real 8x8 images)':17} {real:.2%}")
    print("latents of the test split per channel: mean, std, posterior std")
    for values in zip(mean.mean((0, 1, 2)), mean.std((0, 1, 2)), std.mean((0, 1, 2)), strict=True):
        print("  " + " ".join(f"{value:6.3f}" for value in values))


def encode(model, params, images):
    """Posterior mean and std of images (N, H, W, C), as NumPy arrays (N, H/f, W/f, Z)."""
    run = jax.jit(lambda x: model.apply({"params": params}, x, method="encode"))
    return jax.device_get(run(images))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=str(asset_path("digits_vae")), help="folder to write")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights, batches and noise")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; expected a number above 0")

    images = jnp.asarray(digits.load_digits("train")[0][..., :1] / np.float32(127.5) - 1)
    params = train(AutoencoderKL(CONFIG), images, args.steps, args.seed)
    params = standardize(params, *encode(AutoencoderKL(CONFIG), params, images))
    config = dataclasses.replace(CONFIG, in_channels=3, out_channels=3)
    save_autoencoder_kl(args.out, AutoencoderKL(config), widen(params), np.float16)
    report(args.out)


if __name__ == "__main__":
    main()
