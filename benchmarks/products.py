"""Bare matrix products of a block's four linear layers, forward and for both gradients, beside PyTorch's.

    python benchmarks/products.py --model DiT-S/4 --batch-size 32 --peer torch

They are most of a training step's arithmetic: no step is faster than they are.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import harness
import jax
import numpy as np
import workers

from dit_jax.config import Config

# What is multiplied of tokens (T, I), weights (I, O) and the output's gradient (T, O).
KINDS = {
    "forward": lambda x, w, g: x @ w,
    "gradient_of_inputs": lambda x, w, g: g @ w.T,
    "gradient_of_weights": lambda x, w, g: x.T @ g,
}
REPEATS = 10


def options() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0])
    harness.add_model_options(parser, "DiT-S/4", 32)
    workers.add_options(parser, ("none", "torch"))
    parser.set_defaults(peer_compile="none")
    return parser.parse_args()


def layers(config: Config) -> Iterator[tuple[int, int]]:
    """(inputs I, outputs O) of qkv, proj, fc1, fc2."""
    d = config.model.hidden_size
    assert d
    hidden = int(d * config.model.mlp_ratio)
    yield from ((d, 3 * d), (d, d), (d, hidden), (hidden, d))


def operands(config: Config) -> list[tuple[np.ndarray, ...]]:
    """x (T, I), w (I, O) and g (T, O) of each layer, float32."""
    tokens = config.train.batch_size * config.model.num_tokens
    rng = np.random.default_rng(0)
    shapes = [((tokens, i), (i, o), (tokens, o)) for i, o in layers(config)]
    return [tuple(rng.standard_normal(shape, np.float32) for shape in of) for of in shapes]


def jax_side(config: Config) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """What was found, and a function for each kind of product."""
    placed = jax.device_put(operands(config))
    errors = {}

    def work(name: str) -> Callable[[], Any]:
        product = jax.jit(KINDS[name])
        found, expected = product(*placed[0]), KINDS[name](*map(np.asarray, placed[0]))
        errors.update(harness.check(name, harness.relative_error(found, expected), 1e-3))
        return lambda: [product(*of).block_until_ready() for _ in range(REPEATS) for of in placed]

    return {"correctness": errors}, {name: work(name) for name in KINDS}


def peer_side(config: Config) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """The same in PyTorch."""
    import torch

    given = [tuple(map(torch.from_numpy, of)) for of in operands(config)]

    def work(name: str) -> Callable[[], Any]:
        return lambda: [KINDS[name](*of) for _ in range(REPEATS) for of in given]

    return {"threads": torch.get_num_threads()}, {name: work(name) for name in KINDS}


def main() -> None:
    args = options()
    config = harness.make_config(args)
    if args.side:
        side = {"jax": jax_side, "peer": peer_side}[args.side]
        return workers.serve(functools.partial(side, config), harness.environment)
    per_image = 2.0 * REPEATS * config.model.num_tokens * sum(i * o for i, o in layers(config))
    harness.compare(args, workers.sides(args), args.batch_size, per_image, works=tuple(KINDS))


if __name__ == "__main__":
    main()
