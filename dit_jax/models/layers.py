"""The loop over a network's layers. Letters: L layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from dit_jax.models.compute import Compute


def saves_cudnn_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """A remat policy that keeps what cuDNN's backward pass needs of its forward pass: the output, and the softmax's
    statistics, which have no name."""
    return bool(primitive.name == "dot_product_attention_fwd_wrapper")


REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("linear"),
    "dots_attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("linear", "attention"), saves_cudnn_attention
    ),
}


def layers(block: type[nn.Module], depth: int, compute: Compute) -> Any:
    """The module `block`, repeated: a module (carry, of each layer, shared) -> (carry, None), of the same arguments.

    A block is a module (carry, its own inputs, shared) -> (carry, None). Carry and inputs are any trees of arrays;
    "of each layer" has a leading axis L. Parameters are stacked on a leading axis L, whether the loop is rolled
    (`lax.scan`) or unrolled.
    """
    repeated: Any = block
    if compute.remat != "none":
        policy = REMAT_POLICIES[compute.remat]
        repeated = nn.remat(block, policy=policy, prevent_cse=compute.unroll)
    return nn.scan(
        repeated,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=depth,
        unroll=depth if compute.unroll else 1,
    )
