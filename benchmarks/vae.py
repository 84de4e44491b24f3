"""Images a second of the autoencoder, encoding and decoding, beside diffusers' PyTorch class.

    python benchmarks/vae.py
    python benchmarks/vae.py --channels 128 256 512 512 --layers 2 --image-size 256 --dtype bfloat16

Random weights, the same in both: diffusers writes them, this package reads them. The default is a quarter of the
width of Stable Diffusion's autoencoder. The peer runs with its images as they are and with channels last.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import workers

from dit_jax.interop.diffusers import load_autoencoder_kl

LAYOUTS = {"": ("--peer-layout", "channels_first"), "-channels-last": ("--peer-layout", "channels_last")}


def options() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0], rounds=5)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128, 128], help="width per level")
    parser.add_argument("--layers", type=int, default=2, help="residual blocks per level")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation, in both"
    )
    harness.add_product_option(parser)
    workers.add_options(parser, ("none", "diffusers"), default="diffusers")
    parser.add_argument("--peer-layout", default="both", choices=("both", "channels_first", "channels_last"))
    return parser.parse_args()


def reference(args: argparse.Namespace) -> tuple[dict[str, Any], workers.Work]:
    """diffusers' class with random weights, written down with images (B, H, W, 3) and what it makes of them."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    levels = len(args.channels)
    peer = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(args.channels),
        layers_per_block=args.layers,
        latent_channels=4,
        norm_num_groups=min(32, *args.channels),
    ).eval()
    peer.save_pretrained(args.exchange)
    size = args.image_size
    images = np.random.default_rng(0).uniform(-1, 1, (args.batch_size, 3, size, size)).astype(np.float32)
    with torch.inference_mode():
        latents = peer.encode(torch.from_numpy(images)).latent_dist.mean
        decoded = peer.decode(latents).sample
    found = {"images": images, "latents": latents.numpy(), "decoded": decoded.numpy()}
    found = {name: np.ascontiguousarray(x.transpose(0, 2, 3, 1)) for name, x in found.items()}
    np.savez(args.exchange / "reference.npz", **found)
    return {}, {}


def jax_side(args: argparse.Namespace) -> tuple[dict[str, Any], workers.Work]:
    """Ours, compared with the reference."""
    harness.set_products(args)
    found = np.load(args.exchange / "reference.npz")
    model, params = load_autoencoder_kl(args.exchange)
    model = model.clone(dtype=jnp.dtype(args.dtype))
    encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode")[0])  # the mean
    decode = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))
    params, images, z = jax.device_put((params, found["images"], found["latents"]))
    limit = harness.tolerance(args)
    errors = harness.check("encode", harness.relative_error(encode(params, images), z), limit)
    error = harness.relative_error(decode(params, z), found["decoded"])
    errors |= harness.check("decode", error, limit)
    return {"correctness": errors}, {
        "encode": lambda: jax.block_until_ready(encode(params, images)),
        "decode": lambda: jax.block_until_ready(decode(params, z)),
    }


def peer_side(args: argparse.Namespace) -> tuple[dict[str, Any], workers.Work]:
    """diffusers' class in the precision of ours."""
    import torch
    import torch_peer
    from diffusers import AutoencoderKL

    torch_peer.set_products(args.float32_products)
    torch.backends.cudnn.benchmark = True  # the quickest of cuDNN's convolutions, found at the first run
    found = np.load(args.exchange / "reference.npz")
    dtype = getattr(torch, args.dtype)
    layout = getattr(torch, "channels_last" if args.peer_layout == "channels_last" else "contiguous_format")
    peer = AutoencoderKL.from_pretrained(args.exchange).eval()
    peer = peer.to(torch_peer.DEVICE, dtype, memory_format=layout)

    def tensor(x: np.ndarray) -> Any:
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        return torch.from_numpy(x).to(torch_peer.DEVICE, dtype, memory_format=layout)

    images, latents = tensor(found["images"]), tensor(found["latents"])
    encode = torch_peer.compiled(lambda x: peer.encode(x).latent_dist.mean, args.peer_compile)
    decode = torch_peer.compiled(lambda z: peer.decode(z).sample, args.peer_compile)

    @torch.inference_mode()
    def run(function: Any, x: Any) -> None:
        function(x)
        torch_peer.synchronize()

    return torch_peer.facts(), {
        "encode": functools.partial(run, encode, images),
        "decode": functools.partial(run, decode, latents),
    }


SIDES = {"jax": jax_side, "reference": reference, "peer": peer_side}


def main() -> None:
    args = options()
    if args.side:
        return workers.serve(functools.partial(SIDES[args.side], args), harness.environment)
    asked = args.peer_layout
    layouts = LAYOUTS if asked == "both" else {"": ("--peer-layout", asked)}
    sides = workers.sides(args, layouts)
    harness.compare(args, sides, args.batch_size, 0.0, reference=True, works=("encode", "decode"))


if __name__ == "__main__":
    main()
