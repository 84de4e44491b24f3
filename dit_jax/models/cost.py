"""What a network costs: arithmetic, parameters, memory.

The DiT paper's "Gflops" are multiply-accumulates (MACs) of one forward pass; FLOPs are twice that, and a
training step costs three forward passes. Counted are all matrix products, and one MAC per element for each
block's modulation (scale and shift): the convention under which the paper's figures come out.

Letters: N tokens, D width, L layers, M hidden width of the MLP, P patch side, C latent channels.
"""

from __future__ import annotations

from dit_jax.config import Config
from dit_jax.models.blocks import MODULATIONS

# Activations that a block keeps for the backward pass, in units of (tokens x width), MLP ratio 4, with fused
# attention: everything; matmul outputs and block input; attention's output as well; the block input alone.
_SAVED = {"none": 18, "dots": 10, "dots_attention": 11, "full": 1}


def forward_macs(config: Config) -> int:
    """MACs of one forward pass on one latent, for a resolved config."""
    m = config.model
    assert m.patch_size and m.hidden_size and m.depth
    n, d, hidden = m.num_tokens, m.hidden_size, int(m.hidden_size * m.mlp_ratio)
    conditions = 2 if m.num_classes > 0 else 1
    t = n + (conditions if m.conditioning == "in_context" else 0)
    block = t * (4 * d * d + 2 * d * hidden) + 2 * t * t * d
    if m.conditioning == "cross_attention":
        block += 2 * n * d * d + 2 * conditions * d * d + 2 * n * conditions * d
    vectors = MODULATIONS[m.conditioning]
    if vectors:
        block += vectors * d * d + 2 * n * d
    patch = m.patch_size**2 * m.in_channels
    out = patch * (2 if config.diffusion.learn_sigma else 1)
    ends = n * d * (patch + out) + (256 * d + d * d) + (2 * d * d if vectors else 0)
    return m.depth * block + ends


def train_flops_per_image(config: Config) -> int:
    """FLOPs of forward and backward on one latent: three forward passes of two FLOPs per MAC."""
    return 6 * forward_macs(config)


def parameter_count(config: Config) -> int:
    """Number of trained parameters (the frozen position table is not one)."""
    import jax
    import jax.numpy as jnp

    from dit_jax.models.create import build_model

    m = config.model
    x = jnp.zeros((1, *m.input_size, m.in_channels))
    t = jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(build_model(config).init, jax.random.key(0), x, t, t)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def activation_bytes_per_image(config: Config) -> int:
    """Estimate of the activations kept for the backward pass, per image, with fused attention.

    Without it (attention "einsum") the float32 logits and their softmax come on top.
    """
    m, c = config.model, config.compute
    assert m.hidden_size and m.depth and m.num_heads
    n, width = m.num_tokens, 2 if c.dtype == "bfloat16" else 4
    kept = m.depth * _SAVED[c.remat] * n * m.hidden_size * width
    if c.attention == "einsum" and c.remat == "none":
        kept += m.depth * m.num_heads * n * n * (4 + width)
    return kept


def state_bytes(config: Config) -> int:
    """Bytes of the training state in float32: parameters, Adam's two moments and one EMA."""
    return 16 * parameter_count(config)
