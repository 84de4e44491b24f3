"""The block of Stable Diffusion 3: two streams, picture and text, that attend to each other (arXiv 2403.03206).

Each stream has its own adaLN-Zero, projections and MLP; attention runs over both sequences joined (figure 2b). In
MMDiT-X blocks (Stable Diffusion 3.5 medium) the picture attends once more, to itself alone.

Letters: B batch, N tokens of the picture, M of the text, D width, H heads, K channels of a head.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dit_jax.models.attention import SelfAttention, attend, with_those_before
from dit_jax.models.compute import TOKENS_LAST, Compute
from dit_jax.models.kernels import tokens_last
from dit_jax.models.linear import Linear
from dit_jax.models.mlp import Mlp
from dit_jax.models.norms import RmsNorm, add_gated
from dit_jax.models.parts import LAYER_NORM, Norm

Array = jax.Array
Streams = dict[str, Array]

# Vectors of width D that adaLN regresses for a block: of the picture, the same with a second attention, of the text,
# and of the text in the last block, whose text goes no further.
PICTURE, DUAL, TEXT, LAST_TEXT = 6, 9, 6, 2


class QkNorm(nn.Module):
    """RMSNorm of every head's queries and keys (section 5.3.2), over their axis K."""

    axis: int = -1

    @nn.compact
    def __call__(self, q: Array, k: Array) -> tuple[Array, Array]:
        """q and k (B, N, H, K), or as `axis` says -> the same."""
        return RmsNorm(q.dtype, axis=self.axis, name="q")(q), RmsNorm(k.dtype, axis=self.axis, name="k")(k)


class JointAttention(nn.Module):
    """Attention over the picture's and the text's tokens joined, each stream by its own projections.

    qk_norm: whether queries and keys are normed. answers_text: whether the text's tokens get an answer.
    """

    num_heads: int
    compute: Compute
    qk_norm: bool
    answers_text: bool

    @nn.compact
    def __call__(self, x: Array, context: Array, mask: Array | None) -> tuple[Array, Array | None]:
        """x (B, N, D), context (B, M, D), mask (B, M) bool, which of it there is (None: all) -> what each stream
        adds, (B, N, D) and (B, M, D) or None."""
        d, n, kernel = x.shape[-1], x.shape[1], self.compute.attention
        if kernel in TOKENS_LAST and mask is not None:  # which that kernel does not take
            kernel = "einsum"
        last = kernel in TOKENS_LAST
        tokens_axis = 3 if last else 1
        parts = [self._queries_keys_values(*stream, last) for stream in (("", x), ("context_", context))]
        q, k, v = (jnp.concatenate(pair, axis=tokens_axis) for pair in zip(*parts, strict=True))
        if last:
            by_head = kernel == "tokens_last_by_head" and not self.compute.splits_inner_axes
            out = tokens_last.attend(q, k, v, by_head, self.compute.batch_sharding)
            equation = "hbkn,hkd->bnd"
        else:
            out, equation = attend(q, k, v, kernel, with_those_before(n, mask)), ""
            out = out if kernel == "cudnn" else checkpoint_name(out, "attention")
        of_x, of_text = jnp.split(out, [n], axis=tokens_axis)
        linear = functools.partial(
            Linear, (d,), in_axes=2, compute=self.compute, quantized=True, bias_by_product=True
        )
        answer = linear(name="context_proj")(of_text, equation) if self.answers_text else None
        return linear(name="proj")(of_x, equation), answer

    def _queries_keys_values(self, stream: str, tokens: Array, last: bool) -> tuple[Array, ...]:
        """Of one stream's tokens (B, T, D), each (B, T, H, K), or (H, B, K, T) for a kernel that has tokens last."""
        name, d = f"{stream}qkv", tokens.shape[-1]
        if last:
            q, k, v = tokens_last.QueriesKeysValues(
                self.num_heads, self.compute.dtype, self.compute.first_axis_shared, name=name
            )(tokens)
        else:
            shape = (3, self.num_heads, d // self.num_heads)
            qkv = Linear(shape, compute=self.compute, quantized=True, name=name)(tokens)
            q, k, v = (qkv[:, :, i] for i in range(3))
        if self.qk_norm:
            q, k = QkNorm(2 if last else -1, name=f"{stream}norm")(q, k)
        return q, k, v


class JointBlock(nn.Module):
    """One block over both streams; a layer of `layers`.

    dual: the picture attends to itself as well. last: the text is attended to, and goes no further.
    """

    num_heads: int
    mlp_hidden: int
    compute: Compute
    qk_norm: bool
    dual: bool = False
    last: bool = False
    norm: Norm = LAYER_NORM

    @nn.compact
    def __call__(self, streams: Streams, modulation: Streams, mask: Array | None) -> tuple[Streams, None]:
        """streams: "x" (B, N, D) and "context" (B, M, D); modulation: vectors of each, (B, 6 or 9, D) and
        (B, 6 or 2, D); mask (B, M) bool, which of the text there is (None: all)."""
        compute, norm = self.compute, self.norm
        x, context = compute.split_batch(streams["x"]), compute.split_batch(streams["context"])
        of_x, of_text = (
            [m[:, i] for i in range(m.shape[1])] for m in (modulation["x"], modulation["context"])
        )
        shift1, scale1, gate1, shift2, scale2, gate2 = of_x[:PICTURE]
        attention = JointAttention(self.num_heads, compute, self.qk_norm, not self.last, name="attn")
        mlp = Mlp(self.mlp_hidden, compute, name="mlp")

        x, h = norm.add_and_modulate(x, None, None, shift1, scale1, compute)
        context, h_text = norm.add_and_modulate(context, None, None, of_text[0], of_text[1], compute)
        attended, answer = attention(h, h_text, mask)
        if self.dual:
            shift, scale, gate = of_x[PICTURE:]
            parts = QkNorm(parent=None) if self.qk_norm else None
            again = SelfAttention(self.num_heads, compute, parts, name="attn2")
            alone = again(norm.modulate(x, shift, scale, compute))
            x = add_gated(x, alone, gate)
        x, h = norm.add_and_modulate(x, attended, gate1, shift2, scale2, compute)
        x = add_gated(x, mlp(h), gate2)
        if answer is not None:
            _, _, gate1, shift2, scale2, gate2 = of_text
            context, h = norm.add_and_modulate(context, answer, gate1, shift2, scale2, compute)
            context = add_gated(context, Mlp(self.mlp_hidden, compute, name="context_mlp")(h), gate2)
        return {"x": x, "context": context}, None
