"""Images a second of a training step, optimizer and EMA included, beside the same work in PyTorch.

    python benchmarks/train_step.py --model DiT-S/4 --batch-size 32 --peer torch
    python benchmarks/train_step.py --model DiT-XL/2 --batch-size 256 --dtype bfloat16 --remat dots_attention

The step is the trainer's own, on synthetic moments that already lie on the device. With a peer, steps are timed
in turns; on a GPU, where both do not fit beside each other, run --only jax and --only peer one after the other.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import harness
import jax
import numpy as np
import workers

from dit_jax.config import MeshConfig
from dit_jax.models import cost
from dit_jax.training.program import build_program
from dit_jax.training.sharding import batch_sharding, make_mesh

PRECISIONS = {"": ("--peer-precision", "autocast"), "-master": ("--peer-precision", "master")}


def options() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0])
    harness.add_model_options(parser, "DiT-S/4", 32)
    parser.add_argument("--quantization", default="none", choices=("none", "fp8"), help="large products")
    parser.add_argument("--remat", default="none", choices=("none", "full", "dots", "dots_attention"))
    parser.add_argument("--microbatch", type=int, default=0, help="images on a device at once; 0: all")
    parser.add_argument("--steps-per-round", type=int, default=1, help="steps between two looks at the clock")
    workers.add_options(parser, ("none", "torch", "diffusers"))
    parser.add_argument("--peer-precision", default="both", choices=("both", "autocast", "master"),
                        help="of the peer in bfloat16: autocast, or pure with float32 master weights")  # fmt: skip
    return parser.parse_args()


def sides(args: argparse.Namespace) -> list[workers.Side]:
    """Ours, and the peer as it is and compiled; in bfloat16 in both of its precisions."""
    if args.dtype == "float32":
        return workers.sides(args)
    asked = args.peer_precision
    return workers.sides(args, PRECISIONS if asked == "both" else {"": ("--peer-precision", asked)})


def jax_step(args: argparse.Namespace) -> tuple[dict[str, Any], workers.Work]:
    """What was found, and a function that runs the steps of a round."""
    config = harness.make_config(args, microbatch=args.microbatch)
    harness.set_products(args)
    program = build_program(
        config, make_mesh(MeshConfig()), scaling_factor=harness.SCALING_FACTOR, shift_factor=0.0
    )
    params = harness.random_params(program.init().params)
    limit = harness.tolerance(args)
    errors = harness.check_training(program.model, program.process, config, params, limit)
    batch = jax.device_put(harness.synthetic_batch(config), batch_sharding(program.mesh))
    step = program.step.lower(program.state, batch).compile()
    state = program.start_from(params)

    def run() -> None:
        nonlocal state
        for _ in range(args.steps_per_round):
            state, metrics = step(state, batch)
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            raise SystemExit(f"the loss became {loss}")

    memory = step.memory_analysis().temp_size_in_bytes
    facts = {"correctness": errors, "memory_bytes": memory, "unrolled": program.model.compute.unroll}
    return facts, {"round": run}


def reference(args: argparse.Namespace, path: pathlib.Path) -> tuple[dict[str, Any], workers.Work]:
    """Weights, inputs, output and loss of our network in float32, for the peer's check."""
    from dit_jax.diffusion.create import create_process
    from dit_jax.interop.official import state_dict_from_params

    model, config = harness.plain(harness.make_config(args))
    process, m = create_process(config.diffusion), config.model
    rng = np.random.default_rng(2)
    x0, noise = rng.standard_normal((2, 4, *m.input_size, m.in_channels), np.float32)
    t, y = np.array([0, 3, 500, 999], np.int32), np.arange(4, dtype=np.int32) % m.num_classes
    params = harness.random_params(jax.jit(model.init)(jax.random.key(0), x0, t, y)["params"])

    @jax.jit
    def run(params: Any) -> Any:
        denoise: Callable[..., Any] = lambda x, t: model.apply({"params": params}, x, t, y)  # noqa: E731
        terms = process.training_losses(denoise, *map(jax.numpy.asarray, (x0, t, noise)))
        return denoise(jax.numpy.asarray(x0), jax.numpy.asarray(t)), terms["loss"].mean()

    with jax.default_matmul_precision("highest"):
        output, loss = run(params)
    found = {"x0": x0, "noise": noise, "t": t, "y": y, "output": output, "loss": loss}
    np.savez(path, **found, **state_dict_from_params(params, model))
    return {}, {}


def peer_step(args: argparse.Namespace, path: pathlib.Path) -> tuple[dict[str, Any], workers.Work]:
    """The same in PyTorch, first compared with the reference where there is one."""
    import torch
    import torch_peer

    config = harness.make_config(args)
    torch.manual_seed(0)
    errors: dict[str, float] = {}
    if args.peer == "torch":
        network = torch_peer.torch_network(config)
        errors = check_peer(network, dict(np.load(path)))
    else:
        network = torch_peer.diffusers_network(config)
    torch_peer.set_products(args.float32_products)  # after the comparison in float32
    network.train()
    step = torch_peer.TrainStep(
        network, args.peer, config, args.peer_compile, harness.SCALING_FACTOR,
        master=args.dtype == "bfloat16" and args.peer_precision == "master",
    )  # fmt: skip
    batch = harness.synthetic_batch(config)
    moments = torch.from_numpy(batch["moments"][:, 0].transpose(0, 3, 1, 2).copy()).to(torch_peer.DEVICE)
    label = torch.from_numpy(batch["label"]).long().to(torch_peer.DEVICE)

    def run() -> None:
        for _ in range(args.steps_per_round):
            loss = step(moments, label)
        if not np.isfinite(loss.item()):
            raise SystemExit("the peer's loss is not finite")

    return {"correctness": errors, **torch_peer.facts()}, {"round": run}


def check_peer(network: Any, found: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative errors of output and loss of the two networks with equal weights, in float32."""
    import torch
    import torch_peer

    x0, noise, t, y, output, loss = (found.pop(name) for name in ("x0", "noise", "t", "y", "output", "loss"))
    network.load_state_dict({name: torch.from_numpy(value) for name, value in found.items()})
    tensors = {
        name: torch.from_numpy(value).to(torch_peer.DEVICE)
        for name, value in (("x0", x0.transpose(0, 3, 1, 2).copy()), ("noise", noise.transpose(0, 3, 1, 2).copy()),
                            ("t", t.astype(np.int64)), ("y", y.astype(np.int64)))
    }  # fmt: skip
    with torch.no_grad():
        theirs = network(tensors["x0"], tensors["t"], tensors["y"]).cpu().numpy().transpose(0, 2, 3, 1)
        their_loss = torch_peer.Diffusion().loss(network, **tensors)
    return harness.check("peer_output", harness.relative_error(output, theirs), 1e-3) | harness.check(
        "peer_loss", harness.relative_error(loss, their_loss.cpu().numpy()), 1e-3
    )


def prepare(args: argparse.Namespace) -> tuple[dict[str, Any], workers.Work]:
    """What a side does in its process."""
    if args.side == "jax":
        return jax_step(args)
    path = args.exchange / "reference.npz"
    return (reference if args.side == "reference" else peer_step)(args, path)


def main() -> None:
    args = options()
    if args.side:
        return workers.serve(functools.partial(prepare, args), harness.environment)
    per_image = cost.train_flops_per_image(harness.make_config(args))
    images = args.batch_size * args.steps_per_round
    checked = args.peer == "torch" and args.only != "jax"
    harness.compare(args, sides(args), images, per_image, reference=checked)


if __name__ == "__main__":
    main()
