"""Images a second of the autoencoder, encoding and decoding, beside diffusers' PyTorch class.

    python benchmarks/vae.py
    python benchmarks/vae.py --channels 128 256 512 512 --layers 2 --image-size 256 --dtype bfloat16

Random weights, the same in both: diffusers writes them, this package reads them. The default is a quarter of the
width of Stable Diffusion's autoencoder.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.interop.diffusers import load_autoencoder_kl


def options() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0], rounds=5)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128, 128], help="width per level")
    parser.add_argument("--layers", type=int, default=2, help="residual blocks per level")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation, in both"
    )
    return parser.parse_args()


def make_peer(args: argparse.Namespace) -> Any:
    """diffusers' class with random weights."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    levels = len(args.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(args.channels),
        layers_per_block=args.layers,
        latent_channels=4,
        norm_num_groups=min(32, *args.channels),
    ).eval()


def main() -> None:
    import torch_peer  # says how PyTorch's threads wait before they start
    from torch_peer import torch

    args = options()
    peer = make_peer(args)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        model, params = load_autoencoder_kl(folder)
    model = model.clone(dtype=jnp.dtype(args.dtype))
    peer.to(torch_peer.DEVICE)
    size = args.image_size
    images = np.random.default_rng(0).uniform(-1, 1, (args.batch_size, size, size, 3)).astype(np.float32)
    encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode")[0])  # the mean
    decode = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))
    params = jax.device_put(params)
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(torch_peer.DEVICE)

    @torch.inference_mode()
    def peer_encode(images: Any) -> Any:
        mean = peer.encode(images).latent_dist.mean
        torch_peer.synchronize()
        return mean

    @torch.inference_mode()
    def peer_decode(latents: Any) -> Any:
        decoded = peer.decode(latents).sample
        torch_peer.synchronize()
        return decoded

    def last(x: Any) -> np.ndarray:
        return np.ascontiguousarray(x.cpu().numpy().transpose(0, 2, 3, 1))

    latents = peer_encode(tensor)
    z, limit = last(latents), harness.TOLERANCE[args.dtype]
    errors = harness.check("encode", harness.relative_error(encode(params, images), z), limit)
    decoded = last(peer_decode(latents))
    errors |= harness.check("decode", harness.relative_error(decode(params, z), decoded), limit)
    placed, placed_z = jax.device_put(images), jax.device_put(z)
    dtype = getattr(torch, args.dtype)  # compared in float32, timed in the same precision as ours
    peer.to(dtype)
    tensor, latents = tensor.to(dtype), latents.to(dtype)
    result = {}
    for name, ours_run, peer_run in (
        ("encode", lambda: jax.block_until_ready(encode(params, placed)), lambda: peer_encode(tensor)),
        ("decode", lambda: jax.block_until_ready(decode(params, placed_z)), lambda: peer_decode(latents)),
    ):
        times = harness.in_turns({"jax": ours_run, "diffusers": peer_run}, args.rounds)
        result[name] = harness.summary(times, args.batch_size)
    harness.finish(args, {"correctness": errors, "results": result})


if __name__ == "__main__":
    main()
