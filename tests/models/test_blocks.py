"""Parts of the block beside the formulas: GELU, whose derivative is written out, and attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models.attention import attend
from dit_jax.models.kernels.derivatives import gelu


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_derivative_of_gelu_is_that_of_the_formula(dtype):
    x = jnp.linspace(-6, 6, 301).astype(dtype)
    wide = x.astype(jnp.float32)
    expected = jax.vmap(jax.grad(lambda v: nn.gelu(v, approximate=True)))(wide)
    found = jax.vjp(gelu, x)[1](jnp.ones_like(x))[0]
    rtol = 1e-5 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=rtol, atol=1e-5)


def test_attention_holds_for_large_logits():
    q, k, v = np.random.default_rng(3).normal(size=(3, 2, 5, 3, 8))  # (B, N, H, K)
    q = q * 300
    logits = np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(8)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("bhnm,bmhk->bnhk", weights / weights.sum(-1, keepdims=True), v)
    found = attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), "einsum")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
