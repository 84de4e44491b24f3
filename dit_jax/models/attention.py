"""Multi-head attention: self-attention over tokens and cross-attention to a short context.

Letters: B batch, N tokens, M context tokens, D width, H heads, K channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dit_jax.models.compute import TOKENS_LAST, Compute
from dit_jax.models.compute import resolve_attention as resolve_attention
from dit_jax.models.initializers import Initializer
from dit_jax.models.kernels import tokens_last
from dit_jax.models.linear import Linear

Array = jax.Array


def attend(q: Array, k: Array, v: Array, kernel: str, mask: Array | None = None) -> Array:
    """softmax(q k^T / sqrt(K)) v with the softmax in float32: q (B,N,H,K), k and v (B,M,H,K) -> (B,N,H,K).

    mask: (B, M) bool, which keys there are (None: all). The answer of a row without any is zero.
    """
    if kernel != "einsum":
        fused: Any = jax.nn.dot_product_attention
        if mask is None:
            return fused(q, k, v, implementation=kernel)
        of_all = jnp.broadcast_to(mask[:, None, None, :], (len(mask), 1, q.shape[1], mask.shape[1]))
        out = fused(q, k, v, mask=of_all, implementation=kernel)
        return jnp.where(mask.any(axis=1)[:, None, None, None], out, 0)
    # Heads before tokens: the batched products then read contiguous (tokens, channels) matrices.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    logits = jnp.einsum("bhnk,bhmk->bhnm", q * (q.shape[-1] ** -0.5), k, preferred_element_type=jnp.float32)
    if mask is not None:
        there = mask[:, None, None, :]
        # Finite, so that a row without keys has a difference from its maximum.
        logits = jnp.where(there, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    if mask is not None:
        weights = jnp.where(there, weights, 0)
    out = jnp.einsum("bhnm,bhmk->bhnk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    # The softmax's denominator divides the K channels of the result, not the M weights.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = out / (total if mask is None else jnp.where(total > 0, total, 1))
    return out.astype(v.dtype).transpose(0, 2, 1, 3)


def with_those_before(count: int, mask: Array | None) -> Array | None:
    """A mask (B, M) bool of tokens before which stand `count` that are always there -> (B, count + M)."""
    return None if mask is None else jnp.pad(mask, ((0, 0), (count, 0)), constant_values=True)


QueriesKeys = Callable[[Array, Array], tuple[Array, Array]]


class SelfAttention(nn.Module):
    """Self-attention with one fused projection to queries, keys and values.

    queries_keys: a part that makes what is compared of queries and keys, (B, N, H, K) each: a norm, a rotation.
    """

    num_heads: int
    compute: Compute = Compute(attention="einsum")
    queries_keys: QueriesKeys | None = None

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """x (B, N, D), mask (B, N) bool of the tokens that are attended to (None: all) -> (B, N, D)."""
        d, kernel = x.shape[-1], self.compute.attention
        if kernel in TOKENS_LAST and (self.queries_keys is not None or mask is not None):
            kernel = "einsum"  # the parts are for another layout, and that kernel takes no mask
        heads = (self.num_heads, d // self.num_heads)
        linear = functools.partial(Linear, compute=self.compute, quantized=True)
        project_out = linear((d,), in_axes=2, bias_by_product=True, name="proj")
        if kernel in TOKENS_LAST:
            # Heads that are split over devices are not taken one by one.
            by_head = kernel == "tokens_last_by_head" and not self.compute.splits_inner_axes
            q, k, v, *biases = tokens_last.QueriesKeysValues(
                self.num_heads, self.compute.dtype, self.compute.first_axis_shared, by_head, name="qkv"
            )(x)
            out = tokens_last.attend(q, k, v, by_head, self.compute.batch_sharding, *biases)
            return project_out(out, "hbkn,hkd->bnd")
        qkv = linear((3, *heads), name="qkv")(x)  # (B, N, 3, H, K)
        q, k = qkv[:, :, 0], qkv[:, :, 1]
        if self.queries_keys is not None:
            q, k = self.queries_keys(q, k)
        out = attend(q, k, qkv[:, :, 2], kernel, mask)
        # Named so that a remat policy can keep it; cuDNN's is kept with its statistics (`layers.REMAT_POLICIES`).
        return project_out(out if kernel == "cudnn" else checkpoint_name(out, "attention"))


class CrossAttention(nn.Module):
    """Attention from tokens to a context sequence. out_init: how its last kernel begins (None: as others)."""

    num_heads: int
    compute: Compute = Compute()
    out_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Array, context: Array, mask: Array | None = None) -> Array:
        """x (B, N, D), context (B, M, D), mask (B, M) bool, which of it there is (None: all) -> (B, N, D)."""
        d = x.shape[-1]
        heads = (self.num_heads, d // self.num_heads)
        linear = functools.partial(Linear, compute=self.compute)
        q = linear(heads, name="q")(x)  # (B, N, H, K)
        kv = linear((2, *heads), name="kv")(context)  # (B, M, 2, H, K)
        # Of time and label M is 1 or 2: no fused kernel pays.
        kernel = (
            self.compute.attention if mask is not None and self.compute.attention == "cudnn" else "einsum"
        )
        out = attend(q, kv[:, :, 0], kv[:, :, 1], kernel, mask)
        out = out if kernel == "cudnn" else checkpoint_name(out, "attention")
        return linear((d,), in_axes=2, kernel_init=self.out_init, name="proj")(out)
