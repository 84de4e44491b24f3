"""Multi-head attention: self-attention over tokens and cross-attention to a short context.

Letters: B batch, N tokens, M context tokens, D width, H heads, K channels of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dit_jax.models import tokens_last
from dit_jax.models.embeddings import Linear

Array = jax.Array
TOKENS_LAST = ("tokens_last", "tokens_last_by_head")


def resolve_attention(kernel: str, dtype: Any, num_tokens: int, head_dim: int, device: Any = None) -> str:
    """The kernel that "auto" stands for on `device`, by default the first of the default backend: cudnn on a GPU in
    bfloat16 (where it takes heads of `head_dim` channels), tokens_last on a TPU (by head where the tokens are many),
    else einsum."""
    if kernel != "auto":
        return kernel
    device = device or jax.devices()[0]
    if device.platform in ("gpu", "cuda") and cudnn_serves(dtype, head_dim):
        return "cudnn"
    if device.platform == "tpu":
        long = num_tokens > tokens_last.all_heads_up_to(device.device_kind)
        return "tokens_last_by_head" if long else "tokens_last"
    return "einsum"


def cudnn_serves(dtype: Any, head_dim: int) -> bool:
    """Whether cuDNN's attention takes heads of this type and number of channels, on every GPU that has it."""
    return jnp.dtype(dtype) == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128


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


class SelfAttention(nn.Module):
    """Self-attention with one fused projection to queries, keys and values."""

    num_heads: int
    kernel: str = "einsum"
    dtype: Any = jnp.float32
    heads_split: bool = False  # over devices: then they are not taken one by one, nor joined with other axes
    quantization: str = "none"  # of the two projections

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (B, N, D) -> (B, N, D)."""
        d = x.shape[-1]
        heads = (self.num_heads, d // self.num_heads)
        linear = functools.partial(
            Linear, dtype=self.dtype, quantization=self.quantization, as_matrix=not self.heads_split
        )
        project_out = linear((d,), in_axes=2, name="proj")
        if self.kernel in TOKENS_LAST:
            q, k, v = tokens_last.QueriesKeysValues(self.num_heads, self.dtype, name="qkv")(x)
            by_head = self.kernel == "tokens_last_by_head" and not self.heads_split
            return project_out(tokens_last.attend(q, k, v, by_head), "hbkn,hkd->bnd")
        qkv = linear((3, *heads), name="qkv")(x)  # (B, N, 3, H, K)
        out = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], self.kernel)
        # Named so that a remat policy can keep it; cuDNN's is kept with its statistics (`dit.REMAT_POLICIES`).
        return project_out(out if self.kernel == "cudnn" else checkpoint_name(out, "attention"))


class CrossAttention(nn.Module):
    """Attention from tokens to a context sequence."""

    num_heads: int
    dtype: Any = jnp.float32
    heads_split: bool = False  # over devices

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """x (B, N, D), context (B, M, D) -> (B, N, D)."""
        d = x.shape[-1]
        heads = (self.num_heads, d // self.num_heads)
        linear = functools.partial(Linear, dtype=self.dtype, as_matrix=not self.heads_split)
        q = linear(heads, name="q")(x)  # (B, N, H, K)
        kv = linear((2, *heads), name="kv")(context)  # (B, M, 2, H, K)
        out = attend(q, kv[:, :, 0], kv[:, :, 1], "einsum")  # M is 1 or 2: no fused kernel pays
        return linear((d,), in_axes=2, name="proj")(checkpoint_name(out, "attention"))
