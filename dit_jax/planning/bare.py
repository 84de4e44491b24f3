"""What the bare products of a network's blocks would take on a chip, by its compiler's estimate: the limit of a step.

Those of a block, of its sizes: of the linear layers each alone, with its factors read from memory and its result
written there, in bfloat16 (gradients of weights float32); of attention those of one pass together, without a softmax,
all heads at once or piece by piece, whichever is faster. Nothing else is computed or sent; copies do not count.

    python -m dit_jax.planning.bare --config configs/dit_xl2_imagenet512.py --topology v6e:16x16 --images 16

Letters: T tokens of a chip, I inputs, O outputs, B images, N tokens of one, H heads, K channels of a head.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from dit_jax.compiler import compiler_options
from dit_jax.config import Config, ConfigError, MMDiTConfig, load, resolve
from dit_jax.models import cost
from dit_jax.models.kernels.tokens_last import piece_by_piece
from dit_jax.planning import hlo
from dit_jax.planning.compile_for import no_compilation_cache
from dit_jax.planning.topology import EXAMPLES, topology_devices

Array = jax.Array
Shape = tuple[int, ...]


def mfu_of_bare_products(config: Config, images: int, topology: str, training: bool = True) -> float:
    """Share of the peak that a step of a resolved DiT's config, or a forward pass of it, has if a chip computes
    nothing but the products of its blocks, of so many images at once.

    Raises ConfigError as `topology_devices` does.
    """
    chip, devices = topology_devices(topology)
    cycles = sum(
        _cycles(function, shapes, devices[0]) for function, shapes in layers(config, images, training)
    )
    for function, shapes in attention(config, images, training):
        ways = (function, piece_by_piece(function))
        cycles += min(_cycles(way, shapes, devices[0]) for way in ways)
    flops = cost.train_flops_per_image(config) if training else 2 * cost.forward_macs(config)
    depth = config.model.depth
    assert depth
    return flops * images / (depth * cycles * chip.flops_per_cycle)


def layers(
    config: Config, images: int, training: bool
) -> list[tuple[Callable[..., Any], tuple[Shape, Shape]]]:
    """Products, and the shapes of their factors, of qkv, proj, fc1 and fc2, forward and for both gradients."""
    m = config.model
    assert m.hidden_size
    width, hidden, tokens = m.hidden_size, int(m.hidden_size * m.mlp_ratio), images * m.num_tokens
    found: list[tuple[Callable[..., Any], tuple[Shape, Shape]]] = []
    for i, o in ((width, 3 * width), (width, width), (width, hidden), (hidden, width)):
        x, w, grad = (tokens, i), (i, o), (tokens, o)
        found.append((lambda x, w: jnp.einsum("ti,io->to", x, w), (x, w)))
        if training:
            found.append((lambda grad, w: jnp.einsum("to,io->ti", grad, w), (grad, w)))
            found.append((_of_weights, (x, grad)))
    return found


def attention(
    config: Config, images: int, training: bool
) -> list[tuple[Callable[..., Any], tuple[Shape, ...]]]:
    """Two products of the forward pass, five of the backward pass; all factors and results are (H, B, K, N)."""
    m = config.model
    assert m.hidden_size and m.num_heads
    one = (m.num_heads, images, m.hidden_size // m.num_heads, m.num_tokens)
    forward, backward = (_attended, (one,) * 3), (_attention_gradients, (one,) * 4)
    return [forward, backward] if training else [forward]


def _of_weights(x: Array, grad: Array) -> Array:
    return jnp.einsum("ti,to->io", x, grad, preferred_element_type=jnp.float32)


def _attended(q: Array, k: Array, v: Array) -> tuple[Array]:
    return (jnp.einsum("hbkm,hbmn->hbkn", v, jnp.einsum("hbkm,hbkn->hbmn", k, q)),)


def _attention_gradients(q: Array, k: Array, v: Array, grad: Array) -> tuple[Array, ...]:
    weights, grad_weights = jnp.einsum("hbkm,hbkn->hbmn", k, q), jnp.einsum("hbkm,hbkn->hbmn", v, grad)
    grad_q = jnp.einsum("hbkm,hbmn->hbkn", k, grad_weights)
    grad_k = jnp.einsum("hbkn,hbmn->hbkm", q, grad_weights)
    return grad_q, grad_k, jnp.einsum("hbmn,hbkn->hbkm", weights, grad)


def _cycles(function: Callable[..., Any], shapes: tuple[Shape, ...], device: Any) -> int:
    """Cycles of the products in a function of bfloat16 arrays, compiled as a step is."""
    options = compiler_options(Mesh(np.array([device]), ("chip",)))
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=SingleDeviceSharding(device)) for s in shapes]
    with no_compilation_cache():
        text = jax.jit(function, compiler_options=options).lower(*arrays).compile().as_text() or ""
    # These are the only operations here: no kernel needs the peak.
    operations = hlo.operations(hlo.parse(text), 1.0)
    return sum(o.cycles for o in operations if "dot_general" in o.source)


def main(args: Sequence[str] | None = None) -> None:
    """Print the limit of a recipe's training step on a chip."""
    parser = argparse.ArgumentParser(
        description="The MFU of the bare products of a DiT's training step on a TPU."
    )
    parser.add_argument("--config", required=True, help="a recipe in configs/")
    parser.add_argument("--topology", required=True, help=f"TPUs that need not be here: {EXAMPLES}")
    parser.add_argument("--images", type=int, required=True, help="images that a chip computes at once")
    options = parser.parse_args(args)
    if not 1 <= options.images < 2**31:
        parser.error(f"--images is {options.images}; expected 1 to {2**31 - 1}")
    try:
        config = resolve(load(options.config))
        if isinstance(config.model, MMDiTConfig):
            raise ConfigError(f"--config is {options.config}, an MMDiT; expected a DiT")
        limit = mfu_of_bare_products(config, options.images, options.topology)
    except ConfigError as error:
        sys.exit(str(error))
    print(
        f"{config.model.name}, {options.images} images on a chip of {options.topology}: {limit:.1%} of the peak"
    )


if __name__ == "__main__":
    main()
