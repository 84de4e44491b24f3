"""The loop over a network's layers. Letters: L layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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


def layers(block: type[nn.Module], depth: int, compute: Compute, skipped: Collection[int] = ()) -> Any:
    """The module `block`, repeated: a module (carry, of each layer, shared) -> (carry, None), of the same arguments.

    A block is a module (carry, its own inputs, shared) -> (carry, None). Carry and inputs are any trees of arrays;
    "of each layer" has a leading axis L. Parameters are stacked on a leading axis L, whether the loop is rolled
    (`lax.scan`) or unrolled. skipped: numbers of layers that leave the carry as it is.
    """
    repeated: Any = _skippable(block) if skipped else block
    if compute.remat != "none":
        policy = REMAT_POLICIES[compute.remat]
        repeated = nn.remat(repeated, policy=policy, prevent_cse=compute.unroll)
    scanned: Any = nn.scan(
        repeated,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=depth,
        unroll=depth if compute.unroll else 1,
    )
    if not skipped:
        return scanned
    stays = jnp.asarray([i in skipped for i in range(depth)])

    def skipping(*args: Any, **options: Any) -> Any:
        module = scanned(*args, **options)
        return lambda carry, own, shared: module(carry, (own, stays), shared)

    return skipping


def _skippable(block: Any) -> Any:
    """The block with one more input of its own: whether it leaves the carry as it is. It is computed all the same:
    of a loop over stacked parameters no part can be left out."""

    class Skippable(block):
        def __call__(self, carry: Any, own: Any, shared: Any) -> tuple[Any, None]:
            inputs, stays = own
            after, _ = super().__call__(carry, inputs, shared)
            return jax.tree.map(lambda new, old: jnp.where(stays, old, new), after, carry), None

    return Skippable
