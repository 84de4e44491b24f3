"""Images a second of the whole guided sampling loop, beside the same loop in PyTorch.

    python benchmarks/sample.py --model DiT-S/4 --steps 50 --peer diffusers
    python benchmarks/sample.py --model DiT-XL/2 --dtype bfloat16 --steps 250 --batch-size 32 --only jax

DDIM with guidance on all channels, from labels to latents; the autoencoder is timed by vae.py. The peer diffusers is
DiTPipeline with a DDIM scheduler, the peer torch the published network with SDPA in a bare loop.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import workers
from jax.sharding import Mesh

from dit_jax.generation.sampling import (
    SamplingOptions,
    make_latent_sampler,
    sample_keys,
    start_noise,
)
from dit_jax.models import cost
from dit_jax.models.compute import unrolls
from dit_jax.models.create import build_model

STEPS_TO_CHECK = 4


def options() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0], rounds=5)
    harness.add_model_options(parser, "DiT-S/4", 8)
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--cfg-scale", type=float, default=1.5, help="guidance scale")
    workers.add_options(parser, ("none", "torch", "diffusers"))
    return parser.parse_args()


def random_params(config: Any) -> Any:
    """Parameters of the config's network in which no gate is zero, on the host."""
    m = config.model
    x, one = jnp.zeros((1, *m.input_size, m.in_channels)), jnp.zeros(1, jnp.int32)
    fresh = jax.jit(build_model(config).init)(jax.random.key(0), x, one, one)["params"]
    return harness.random_params(fresh)


def device_mesh() -> Mesh:
    """All devices, for the batch."""
    return Mesh(np.array(jax.devices()), ("data",))


def jax_loop(
    args: argparse.Namespace, model: Any, config: Any, steps: int
) -> Callable[[Any, np.ndarray], np.ndarray]:
    """(params, labels (B,)) -> latents (B, h, w, c) on the host, over all devices."""
    mesh = device_mesh()
    sampler: Any = make_latent_sampler(
        model, config, SamplingOptions("ddim", steps, cfg_scale=args.cfg_scale), mesh
    )
    return lambda params, labels: np.asarray(sampler(params, 0, np.arange(len(labels)), labels))


def labels_of(args: argparse.Namespace, config: Any) -> np.ndarray:
    """The labels of a batch, (B,)."""
    return np.arange(args.batch_size, dtype=np.int32) % config.model.num_classes


def few(labels: np.ndarray) -> np.ndarray:
    """Those that results are compared on."""
    return labels[: max(4, jax.device_count())]


def plain_latents(args: argparse.Namespace, config: Any, params: Any, labels: np.ndarray) -> np.ndarray:
    """A few steps computed plainly in float32."""
    with jax.default_matmul_precision("highest"):
        return jax_loop(args, *harness.plain(config), STEPS_TO_CHECK)(params, labels)


def jax_side(args: argparse.Namespace, config: Any) -> tuple[dict[str, Any], workers.Work]:
    """What was found, and a function that samples a batch."""
    harness.set_products(args)
    labels, params = labels_of(args, config), random_params(config)
    model = build_model(config)
    found = jax_loop(args, model, config, STEPS_TO_CHECK)(params, few(labels))
    error = harness.relative_error(found, plain_latents(args, config, params, few(labels)))
    errors = harness.check("latents", error, harness.tolerance(args))
    loop, placed = jax_loop(args, model, config, args.steps), jax.device_put(params)
    unrolled = unrolls(config.compute.unroll, config.model.hidden_size, device_mesh())
    facts = {"correctness": errors, "unrolled": unrolled}
    return facts, {"round": lambda: finite(loop(placed, labels))}


def reference(args: argparse.Namespace, config: Any) -> tuple[dict[str, Any], workers.Work]:
    """Our weights, and start noise and latents of our plain loop, for the peer's check."""
    from dit_jax.interop.official import state_dict_from_params

    params, labels = random_params(config), few(labels_of(args, config))
    latents = plain_latents(args, config, params, labels)
    keys = sample_keys(jax.random.key(0), jnp.arange(len(labels)))
    noise = np.asarray(start_noise(keys, latents.shape[1:]))
    weights = state_dict_from_params(params, build_model(config))
    np.savez(args.exchange / "reference.npz", latents=latents, noise=noise, labels=labels, **weights)
    return {}, {}


def peer_side(args: argparse.Namespace, config: Any) -> tuple[dict[str, Any], workers.Work]:
    """The same in PyTorch: a network with our weights is first compared with the reference."""
    import torch
    import torch_peer

    classes = torch.from_numpy(labels_of(args, config).astype(np.int64)).to(torch_peer.DEVICE)
    if args.peer == "diffusers":
        torch_peer.set_products(args.float32_products)
        pipeline = torch_peer.make_diffusers_loop(config, args.steps, args.cfg_scale, args.peer_compile)
        return torch_peer.facts(), {"round": lambda: finite(pipeline(classes).numpy())}
    network = torch_peer.torch_network(config)
    found = dict(np.load(args.exchange / "reference.npz"))
    errors = check_peer(args, config, network, found)
    torch_peer.set_products(args.float32_products)
    m = config.model
    noise = torch.randn(len(classes), m.in_channels, *m.input_size, device=torch_peer.DEVICE)
    loop = torch_peer.make_torch_loop(network, config, args.steps, args.cfg_scale, args.peer_compile)
    facts = {"correctness": errors, **torch_peer.facts()}
    return facts, {"round": lambda: finite(loop(noise, classes).cpu().numpy())}


def check_peer(
    args: argparse.Namespace, config: Any, network: Any, found: dict[str, np.ndarray]
) -> dict[str, float]:
    """The error of the peer torch, with our weights and start noise, against our plain loop."""
    import torch
    import torch_peer

    latents, noise, labels = (found.pop(name) for name in ("latents", "noise", "labels"))
    network.load_state_dict({name: torch.from_numpy(value) for name, value in found.items()})
    _, plain = harness.plain(config)
    loop = torch_peer.make_torch_loop(network, plain, STEPS_TO_CHECK, args.cfg_scale, "none")
    inputs = (noise.transpose(0, 3, 1, 2).copy(), labels.astype(np.int64))
    theirs = loop(*(torch.from_numpy(a).to(torch_peer.DEVICE) for a in inputs)).cpu().numpy()
    return harness.check("peer_latents", harness.relative_error(theirs.transpose(0, 2, 3, 1), latents), 1e-3)


def finite(latents: np.ndarray) -> None:
    if not np.isfinite(latents).all():
        raise SystemExit("the latents are not finite")


SIDES = {"jax": jax_side, "reference": reference, "peer": peer_side}


def main() -> None:
    args = options()
    config = harness.make_config(args)
    if args.side:
        prepare = functools.partial(SIDES[args.side], args, config)
        return workers.serve(prepare, harness.environment)
    passes = args.steps * (2 if args.cfg_scale != 1.0 else 1)
    per_image = 2.0 * cost.forward_macs(config) * passes
    checked = args.peer == "torch" and args.only != "jax"
    harness.compare(args, workers.sides(args), args.batch_size, per_image, warmup=0, reference=checked)


if __name__ == "__main__":
    main()
