"""The branch of a block that takes each token by itself. Letters: B batch, N tokens, D width."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from dit_jax.models.compute import TOKENS_LAST, Compute
from dit_jax.models.linear import Linear

Array = jax.Array


class Mlp(nn.Module):
    """Two linear layers with tanh-approximated GELU between."""

    hidden: int
    compute: Compute = Compute(attention="einsum")

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x (B, N, D) -> (B, N, D)."""
        # Not on flattened tokens, a TPU writes an output that the backward pass needs straight to its place among
        # all layers' outputs.
        equation = "bnd,dh->bnh" if self.compute.attention in TOKENS_LAST else ""
        linear = functools.partial(Linear, compute=self.compute, quantized=True)
        h = linear((self.hidden,), name="fc1")(x, equation)
        if self.compute.quantization == "fp8":
            # Without Triton's products XLA would join GELU to this one, and then refuse to compile what it made.
            h = jax.lax.optimization_barrier(h)
        return linear((x.shape[-1],), bias_by_product=True, name="fc2")(self.compute.gelu(h), equation)
