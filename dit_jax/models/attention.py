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
from dit_jax.models.kernels import tokens_last
from dit_jax.models.linear import Linear

Array = jax.Array


def attend(q: Array, k: Array, v: Array, kernel: str) -> Array:
    """softmax(q k^T / sqrt(K)) v with the softmax in float32: q (B,N,H,K), k and v (B,M,H,K) -> (B,N,H,K)."""
    if kernel != "einsum":
        fused: Any = jax.nn.dot_product_attention
        return fused(q, k, v, implementation=kernel)
    # Heads before tokens: the batched products then read contiguous (tokens, channels) matrices.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    logits = jnp.einsum("bhnk,bhmk->bhnm", q * (q.shape[-1] ** -0.5), k, preferred_element_type=jnp.float32)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    out = jnp.einsum("bhnm,bhmk->bhnk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    # The softmax's denominator divides the K channels of the result, not the M weights.
    out = out / jnp.sum(weights, axis=-1, keepdims=True)
    return out.astype(v.dtype).transpose(0, 2, 1, 3)


QueriesKeys = Callable[[Array, Array], tuple[Array, Array]]


class SelfAttention(nn.Module):
    """Self-attention with one fused projection to queries, keys and values.

    queries_keys: a part that makes what is compared of queries and keys, (B, N, H, K) each: a norm, a rotation.
    """

    num_heads: int
    compute: Compute = Compute(attention="einsum")
    queries_keys: QueriesKeys | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (B, N, D) -> (B, N, D)."""
        d, kernel = x.shape[-1], self.compute.attention
        if kernel in TOKENS_LAST and self.queries_keys is not None:  # which is for another layout
            kernel = "einsum"
        heads = (self.num_heads, d // self.num_heads)
        linear = functools.partial(Linear, compute=self.compute, quantized=True)
        project_out = linear((d,), in_axes=2, name="proj")
        if kernel in TOKENS_LAST:
            q, k, v = tokens_last.QueriesKeysValues(self.num_heads, self.compute.dtype, name="qkv")(x)
            # Heads that are split over devices are not taken one by one.
            by_head = kernel == "tokens_last_by_head" and not self.compute.splits_inner_axes
            return project_out(tokens_last.attend(q, k, v, by_head), "hbkn,hkd->bnd")
        qkv = linear((3, *heads), name="qkv")(x)  # (B, N, 3, H, K)
        q, k = qkv[:, :, 0], qkv[:, :, 1]
        if self.queries_keys is not None:
            q, k = self.queries_keys(q, k)
        out = attend(q, k, qkv[:, :, 2], kernel)
        # Named so that a remat policy can keep it; cuDNN's is kept with its statistics (`layers.REMAT_POLICIES`).
        return project_out(out if kernel == "cudnn" else checkpoint_name(out, "attention"))


class CrossAttention(nn.Module):
    """Attention from tokens to a context sequence."""

    num_heads: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """x (B, N, D), context (B, M, D) -> (B, N, D)."""
        d = x.shape[-1]
        heads = (self.num_heads, d // self.num_heads)
        linear = functools.partial(Linear, compute=self.compute)
        q = linear(heads, name="q")(x)  # (B, N, H, K)
        kv = linear((2, *heads), name="kv")(context)  # (B, M, 2, H, K)
        out = attend(q, kv[:, :, 0], kv[:, :, 1], "einsum")  # M is 1 or 2: no fused kernel pays
        return linear((d,), in_axes=2, name="proj")(checkpoint_name(out, "attention"))
