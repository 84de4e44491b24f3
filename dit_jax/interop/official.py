"""The published DiT checkpoints: their state dict to and from our parameters.

Names and layouts are those of the original PyTorch implementation (adaLN-Zero models): Linear weights are
(out, in), the patch projection is a convolution (D, C, P, P), blocks are numbered, positions are stored.

Letters: D width, L layers, H heads, K channels of a head, P patch side, C latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dit_jax.interop import keymap
from dit_jax.interop.keymap import FLAT, LINEAR, Constant, Layout, MismatchError, Rule, linear, patches
from dit_jax.models.dit import DiT
from dit_jax.models.embeddings import sincos_positions


def _linear(path: str, name: str, layout: Layout = LINEAR, layer_axis: int = 0) -> tuple[Rule, Rule]:
    """A Linear layer; `layer_axis` is the kernel's, a bias has it first."""
    return (
        Rule(f"{path}/kernel", f"{name}.weight", layout, layer_axis),
        Rule(f"{path}/bias", f"{name}.bias", FLAT),
    )


def rules(patch_size: int) -> tuple[Rule, ...]:
    """The published names of a model's parameters."""
    return (
        *_linear("patch_embed", "x_embedder.proj", patches(patch_size)),
        *_linear("t_embed/fc1", "t_embedder.mlp.0"),
        *_linear("t_embed/fc2", "t_embedder.mlp.2"),
        Rule("y_embed/embedding", "y_embedder.embedding_table.weight"),
        *_linear("blocks/attn/qkv", "blocks.*.attn.qkv"),  # (L, D, 3, H, K)
        *_linear("blocks/attn/proj", "blocks.*.attn.proj", linear(in_axes=2)),  # (L, H, K, D)
        *_linear(r"blocks/mlp/(fc\d)", r"blocks.*.mlp.\1"),
        *_linear("adaln", "blocks.*.adaLN_modulation.1", layer_axis=1),  # (D, L, 6, D)
        *_linear("final_adaln", "final_layer.adaLN_modulation.1"),  # (D, 2, D)
        *_linear("final_linear", "final_layer.linear"),
    )


def _constants(model: DiT) -> dict[str, Constant]:
    if model.conditioning != "adaln_zero":
        raise ValueError(
            f"the model's conditioning is {model.conditioning!r}; published checkpoints are adaln_zero"
        )
    positions = sincos_positions(*model.grid_size, model.hidden_size)[None]
    return {"pos_embed": Constant(positions, "the 2D sine-cosine table of this grid")}


def _shapes(model: DiT) -> dict[str, Any]:
    x = jax.ShapeDtypeStruct((1, *model.latent_size, model.in_channels), np.float32)
    number = jax.ShapeDtypeStruct((1,), np.int32)
    return jax.eval_shape(model.init, jax.random.key(0), x, number, number)["params"]


def params_from_state_dict(state_dict: Mapping[str, Any], model: DiT) -> dict[str, Any]:
    """Our parameters from a published state dict (name -> array).

    Raises ValueError that lists every missing, unexpected or misshapen tensor, and when the stored position
    table is not the model's.
    """
    constants = _constants(model)
    arrays = {name: np.asarray(value, np.float32) for name, value in state_dict.items()}
    try:
        return keymap.to_flax(arrays, _shapes(model), rules(model.patch_size), "the state dict", constants)
    except MismatchError as error:
        problems = [f"missing {name} {shape}" for name, shape in error.missing.items()]
        problems += [f"unexpected {name}" for name in error.unexpected]
        problems += [
            f"{name} has shape {found}, expected {shape}" for name, (found, shape) in error.misshapen.items()
        ]
        raise ValueError(
            "the state dict does not fit the model: " + "; ".join(problems + error.other)
        ) from None


def state_dict_from_params(params: Mapping[str, Any], model: DiT) -> dict[str, np.ndarray]:
    """The published state dict of our parameters, positions included: inverse of `params_from_state_dict`."""
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in keymap.flatten(params).items()}
    return keymap.to_torch(keymap.unflatten(flat), rules(model.patch_size), _constants(model))
