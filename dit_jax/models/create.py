"""From the configuration to a network and its first parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.conditions import TextCondition, condition_of
from dit_jax.config import Config, DiTConfig, MMDiTConfig
from dit_jax.models.compute import Compute
from dit_jax.models.dit import DiT
from dit_jax.models.mmdit import MMDiT
from dit_jax.models.parts import CONVENTIONS


def build_model(config: Config, batch_sharding: Any = None) -> Model:
    """The network of a resolved config, computed as it says; `batch_sharding` as in `Compute`."""
    c = config.compute
    compute = Compute(
        dtype=jnp.dtype(c.dtype),
        attention=c.attention,
        norm_kernel=c.norm_kernel,
        quantization=c.quantization,
        remat=c.remat,
        unroll=c.unroll is True,  # "auto" is for those who know the devices (`compute.unrolls`)
        batch_sharding=batch_sharding,
    )
    return BUILDERS[config.model.kind](config, compute)


def _dit(config: Config, compute: Compute) -> DiT:
    m, condition = config.model, condition_of(config)
    assert isinstance(m, DiTConfig) and m.patch_size and m.hidden_size and m.num_heads and m.depth
    return DiT(
        input_size=m.input_size,
        patch_size=m.patch_size,
        in_channels=m.in_channels,
        hidden_size=m.hidden_size,
        depth=m.depth,
        num_heads=m.num_heads,
        mlp_ratio=m.mlp_ratio,
        num_classes=m.num_classes,
        class_dropout_prob=m.class_dropout_prob,
        learn_sigma=config.diffusion.learn_sigma,
        conditioning=m.conditioning,
        text=condition if isinstance(condition, TextCondition) else None,
        text_layers=config.text.layers,
        lora=config.lora,
        compute=compute,
        parts=CONVENTIONS[m.convention],
    )


def _mmdit(config: Config, compute: Compute) -> MMDiT:
    m, text = config.model, condition_of(config)
    assert isinstance(m, MMDiTConfig) and isinstance(text, TextCondition)
    sizes = {name: getattr(m, name) for name in (
        "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "qk_norm",
        "dual_blocks", "positions_side", "positions_base",
    )}  # fmt: skip
    return MMDiT(**sizes, text=text, text_layers=config.text.layers, lora=config.lora, compute=compute)


# A new kind of network is its config in dit_jax.config, its module, and its row here.
Model = DiT | MMDiT
BUILDERS: dict[str, Callable[[Config, Compute], Model]] = {"dit": _dit, "mmdit": _mmdit}


def init_params(model: Model, config: Config, key: jax.Array) -> Any:
    """Fresh parameters of the network, which do not depend on how it is computed: no kernel is asked for them."""
    m = config.model
    x = jnp.zeros((1, *m.input_size, m.in_channels), jnp.float32)
    condition = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), model.condition.shapes(1))
    return model.plain().init(key, x, jnp.zeros((1,), jnp.int32), condition)["params"]
