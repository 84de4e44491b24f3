"""Images a second of a training step, optimizer and EMA included, beside the same work in PyTorch.

    python benchmarks/train_step.py --model DiT-S/4 --batch-size 32 --peer torch
    python benchmarks/train_step.py --model DiT-XL/2 --batch-size 256 --dtype bfloat16 --remat dots_attention

The step is the trainer's own, on synthetic moments that already lie on the device. With a peer, steps are timed
in turns; on a GPU, where both do not fit beside each other, run --only jax and --only peer one after the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import harness
import jax
import numpy as np

from dit_jax import flops
from dit_jax.config import MeshConfig
from dit_jax.training.program import build_program
from dit_jax.training.sharding import batch_sharding, make_mesh


def options() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0])
    harness.add_model_options(parser, "DiT-S/4", 32)
    parser.add_argument("--quantization", default="none", choices=("none", "fp8"), help="large products")
    parser.add_argument("--remat", default="none", choices=("none", "full", "dots", "dots_attention"))
    parser.add_argument("--microbatch", type=int, default=0, help="images on a device at once; 0: all")
    parser.add_argument("--steps-per-round", type=int, default=1, help="steps between two looks at the clock")
    parser.add_argument("--peer", default="none", choices=("none", "torch", "diffusers"))
    parser.add_argument("--peer-compile", default="none", choices=("none", "default", "max-autotune"))
    parser.add_argument("--only", default="both", choices=("both", "jax", "peer"))
    return parser.parse_args()


def jax_step(args: argparse.Namespace, result: dict[str, Any]) -> tuple[Callable[[], None], Any]:
    """A function that runs the steps of a round, and the parameters that it started from, on the host."""
    config = harness.make_config(args, microbatch=args.microbatch)
    program = build_program(
        config, make_mesh(MeshConfig()), scaling_factor=harness.SCALING_FACTOR, shift_factor=0.0
    )
    params = harness.random_params(program.init().params)
    result["correctness"] = harness.check_training(program.model, program.process, config, params)
    batch = jax.device_put(harness.synthetic_batch(config), batch_sharding(program.mesh))
    step = program.step.lower(program.state, batch).compile()
    result["memory_bytes"] = step.memory_analysis().temp_size_in_bytes
    state = program.start_from(params)

    def run() -> None:
        nonlocal state
        for _ in range(args.steps_per_round):
            state, metrics = step(state, batch)
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            raise SystemExit(f"the loss became {loss}")

    return run, params


def peer_step(args: argparse.Namespace, result: dict[str, Any], params: Any) -> Callable[[], None]:
    """The same in PyTorch; `params` are ours, for the comparison of the two networks."""
    import torch
    import torch_peer

    config = harness.make_config(args)
    torch.manual_seed(0)
    if args.peer == "torch":
        network = torch_peer.torch_network(config, params)
        if params is not None:
            result["correctness"] |= check_peer(config, network, params)
    else:
        network = torch_peer.diffusers_network(config)
    if torch_peer.DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, after the comparison in float32
    network.train()
    step = torch_peer.TrainStep(network, args.peer, config, args.peer_compile, harness.SCALING_FACTOR)
    batch = harness.synthetic_batch(config)
    moments = torch.from_numpy(batch["moments"][:, 0].transpose(0, 3, 1, 2).copy()).to(torch_peer.DEVICE)
    label = torch.from_numpy(batch["label"]).long().to(torch_peer.DEVICE)

    def run() -> None:
        for _ in range(args.steps_per_round):
            loss = step(moments, label)
        if not np.isfinite(loss.item()):
            raise SystemExit("the peer's loss is not finite")

    return run


def check_peer(config: Any, network: Any, params: Any) -> dict[str, float]:
    """Relative errors of output and loss of the two networks with equal weights, in float32."""
    import torch
    import torch_peer

    from dit_jax.diffusion.create import create_process
    from dit_jax.models.dit import build_model

    config = harness.plain(config)
    model, process, m = build_model(config), create_process(config.diffusion), config.model
    rng = np.random.default_rng(2)
    x0, noise = rng.standard_normal((2, 4, *m.input_size, m.in_channels), np.float32)
    t, y = np.array([0, 3, 500, 999], np.int32), np.arange(4, dtype=np.int32) % m.num_classes

    def denoise(x: jax.Array, t: jax.Array) -> Any:
        return model.apply({"params": params}, x, t, y)

    with jax.default_matmul_precision("highest"):
        ours = denoise(jax.numpy.asarray(x0), jax.numpy.asarray(t))
        terms = process.training_losses(denoise, *map(jax.numpy.asarray, (x0, t, noise)))
    tensors = {
        name: torch.from_numpy(value.copy()).to(torch_peer.DEVICE)
        for name, value in (("x0", x0.transpose(0, 3, 1, 2)), ("noise", noise.transpose(0, 3, 1, 2)),
                            ("t", t.astype(np.int64)), ("y", y.astype(np.int64)))
    }  # fmt: skip
    with torch.no_grad():
        theirs = network(tensors["x0"], tensors["t"], tensors["y"]).cpu().numpy().transpose(0, 2, 3, 1)
        loss = torch_peer.Diffusion().loss(network, **tensors)
    return harness.check("peer_output", harness.relative_error(ours, theirs), 1e-3) | harness.check(
        "peer_loss", harness.relative_error(terms["loss"].mean(), loss.cpu().numpy()), 1e-3
    )


def main() -> None:
    args = options()
    result: dict[str, Any] = {"correctness": {}}
    work: dict[str, Callable[[], None]] = {}
    params = None
    if args.only != "peer":
        work["jax"], params = jax_step(args, result)
    if args.peer != "none" and args.only != "jax":
        work[args.peer] = peer_step(args, result, params)
    times = harness.in_turns(work, args.rounds)
    images = args.batch_size * args.steps_per_round
    result["results"] = harness.summary(times, images)
    per_image = flops.train_flops_per_image(harness.make_config(args))
    for line in result["results"].values():
        line |= harness.utilisation(per_image, line["images_per_s"])
    harness.finish(args, result)


if __name__ == "__main__":
    main()
