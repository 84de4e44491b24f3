"""Images a second of the whole guided sampling loop, beside the same loop in PyTorch.

    python benchmarks/sample.py --model DiT-S/4 --steps 50 --peer diffusers
    python benchmarks/sample.py --model DiT-XL/2 --dtype bfloat16 --steps 250 --batch-size 32 --only jax

DDIM with guidance on all channels, from labels to latents; the autoencoder is timed by vae.py. The peer diffusers is
DiTPipeline with a DDIM scheduler, the peer torch the published network with SDPA in a bare loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax import flops
from dit_jax.generation.sampling import SamplingOptions, make_latent_sampler, sample_keys, start_noise
from dit_jax.models.dit import build_model

STEPS_TO_CHECK = 4


def options() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0], rounds=5)
    harness.add_model_options(parser, "DiT-S/4", 8)
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--cfg-scale", type=float, default=1.5, help="guidance scale")
    parser.add_argument("--peer", default="none", choices=("none", "torch", "diffusers"))
    parser.add_argument("--peer-compile", default="none", choices=("none", "default", "max-autotune"))
    parser.add_argument("--only", default="both", choices=("both", "jax", "peer"))
    return parser.parse_args()


def random_params(config: Any) -> Any:
    """Parameters of the config's network in which no gate is zero, on the host."""
    m = config.model
    x, one = jnp.zeros((1, *m.input_size, m.in_channels)), jnp.zeros(1, jnp.int32)
    fresh = jax.jit(build_model(config).init)(jax.random.key(0), x, one, one)["params"]
    return harness.random_params(fresh)


def jax_loop(args: argparse.Namespace, config: Any, steps: int) -> Callable[[Any, np.ndarray], np.ndarray]:
    """(params, labels (B,)) -> latents (B, h, w, c) on the host, over all devices."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sampler: Any = make_latent_sampler(
        build_model(config), config, SamplingOptions(steps=steps, cfg_scale=args.cfg_scale), mesh
    )
    return lambda params, labels: np.asarray(sampler(params, 0, np.arange(len(labels)), labels))


def check(args: argparse.Namespace, config: Any, params: Any, labels: np.ndarray) -> dict[str, float]:
    """The error of a few steps against the same loop computed plainly in float32."""
    found = jax_loop(args, config, STEPS_TO_CHECK)(params, labels)
    with jax.default_matmul_precision("highest"):
        expected = jax_loop(args, harness.plain(config), STEPS_TO_CHECK)(params, labels)
    error = harness.relative_error(found, expected)
    return harness.check("latents", error, harness.TOLERANCE[config.model.dtype])


def check_peer(args: argparse.Namespace, config: Any, params: Any, labels: np.ndarray) -> dict[str, float]:
    """The error of the peer torch, with our weights and start noise, against our plain loop."""
    import torch
    import torch_peer

    plain = harness.plain(config)
    with jax.default_matmul_precision("highest"):
        expected = jax_loop(args, plain, STEPS_TO_CHECK)(params, labels)
    keys = sample_keys(jax.random.key(0), jnp.arange(len(labels)))
    noise = np.asarray(start_noise(keys, expected.shape[1:])).transpose(0, 3, 1, 2).copy()
    network = torch_peer.torch_network(plain, params)
    loop = torch_peer.make_torch_loop(network, plain, STEPS_TO_CHECK, args.cfg_scale, "none")
    tensors = (torch.from_numpy(a).to(torch_peer.DEVICE) for a in (noise, labels.astype(np.int64)))
    found = loop(*tensors).cpu().numpy().transpose(0, 2, 3, 1)
    return harness.check("peer_latents", harness.relative_error(found, expected), 1e-3)


def peer_loop(args: argparse.Namespace, config: Any, params: Any, labels: np.ndarray) -> Callable[[], None]:
    """A function that samples one batch in PyTorch."""
    import torch
    import torch_peer

    classes = torch.from_numpy(labels.astype(np.int64)).to(torch_peer.DEVICE)
    if args.peer == "diffusers":
        pipeline = torch_peer.make_diffusers_loop(config, args.steps, args.cfg_scale, args.peer_compile)
        return lambda: finite(pipeline(classes).numpy())
    m = config.model
    noise = torch.randn(len(labels), m.in_channels, *m.input_size, device=torch_peer.DEVICE)
    network = torch_peer.torch_network(config, params)
    loop = torch_peer.make_torch_loop(network, config, args.steps, args.cfg_scale, args.peer_compile)
    return lambda: finite(loop(noise, classes).cpu().numpy())


def finite(latents: np.ndarray) -> None:
    if not np.isfinite(latents).all():
        raise SystemExit("the latents are not finite")


def main() -> None:
    args = options()
    config = harness.make_config(args)
    labels = np.arange(args.batch_size, dtype=np.int32) % config.model.num_classes
    params = random_params(config)
    result: dict[str, Any] = {"correctness": {}}
    work: dict[str, Callable[[], None]] = {}
    if args.only != "peer":
        few = labels[: max(4, jax.device_count())]
        result["correctness"] |= check(args, config, params, few)
        loop, placed = jax_loop(args, config, args.steps), jax.device_put(params)
        work["jax"] = lambda: finite(loop(placed, labels))
    if args.peer != "none" and args.only != "jax":
        if args.peer == "torch":
            result["correctness"] |= check_peer(args, config, params, labels[: max(4, jax.device_count())])
        work[args.peer] = peer_loop(args, config, params, labels)
    result["results"] = harness.summary(harness.in_turns(work, args.rounds, warmup=1), args.batch_size)
    passes = args.steps * (2 if args.cfg_scale != 1.0 else 1)
    for line in result["results"].values():
        line |= harness.utilisation(2.0 * flops.forward_macs(config) * passes, line["images_per_s"])
    harness.finish(args, result)


if __name__ == "__main__":
    main()
