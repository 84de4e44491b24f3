"""Stable Diffusion 3's network: its state dict, by diffusers' names or a published single file's, and our parameters.

Letters: D width, L layers, H heads, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dit_jax.interop import keymap
from dit_jax.interop.keymap import FLAT, LINEAR, Constant, Rule, layer, linear, patches, reversed_along
from dit_jax.models.embeddings import cropped_positions
from dit_jax.models.mmdit import MMDiT

SINGLE_FILE_PREFIX = "model.diffusion_model."


def _swapped(path: str, name: str, **how: Any) -> tuple[Rule, Rule]:
    """A Linear layer that gives (scale, shift) there, and (shift, scale) here."""
    axis = 1  # of the kernel (D, 2, D)
    return (
        Rule(f"{path}/kernel", f"{name}.weight", reversed_along(axis, LINEAR), layer_axis=1, **how),
        Rule(f"{path}/bias", f"{name}.bias", reversed_along(axis - 1, FLAT), **how),
    )


def diffusers_rules(model: MMDiT) -> tuple[Rule, ...]:
    """The names of diffusers' SD3Transformer2DModel."""
    embed = "time_text_embed"
    return (
        *layer("patch_embed", "pos_embed.proj", patches(model.patch_size)),
        *layer(r"t_embed/fc(\d)", rf"{embed}.timestep_embedder.linear_\1"),
        *layer(r"pooled_embed/fc(\d)", rf"{embed}.text_embedder.linear_\1"),
        *layer("context_embed", "context_embedder"),
        *(rule for group in model.groups for rule in _diffusers_group(group.name, group.first)),
        *_swapped("final_adaln", "norm_out.linear"),
        *layer("final_linear", "proj_out"),
    )


def _diffusers_group(name: str, first: int) -> Iterator[Rule]:
    block = "transformer_blocks.*"
    how: dict[str, Any] = {"first": first}
    yield from layer(f"{name}/(attn2?)/qkv", rf"{block}.\1.to_{{q,k,v}}", **how)  # (L, D, 3, H, K)
    yield from layer(f"{name}/attn/context_qkv", f"{block}.attn.add_{{q,k,v}}_proj", **how)
    yield from layer(
        f"{name}/(attn2?)/proj", rf"{block}.\1.to_out.0", linear(in_axes=2), **how
    )  # (L, H, K, D)
    yield from layer(f"{name}/attn/context_proj", f"{block}.attn.to_add_out", linear(in_axes=2), **how)
    yield Rule(f"{name}/attn/norm/([qk])/scale", rf"{block}.attn.norm_\1.weight", **how)
    yield Rule(f"{name}/attn/context_norm/([qk])/scale", rf"{block}.attn.norm_added_\1.weight", **how)
    yield Rule(f"{name}/attn2/queries_keys/([qk])/scale", rf"{block}.attn2.norm_\1.weight", **how)
    for mlp, there in (("mlp", "ff"), ("context_mlp", "ff_context")):
        yield from layer(f"{name}/{mlp}/fc1", f"{block}.{there}.net.0.proj", **how)
        yield from layer(f"{name}/{mlp}/fc2", f"{block}.{there}.net.2", **how)
    yield from layer(f"{name}_x_adaln", f"{block}.norm1.linear", axis=1, **how)  # (D, L, 6 or 9, D)
    context = _swapped if name == "last_blocks" else _modulation
    yield from context(f"{name}_context_adaln", f"{block}.norm1_context.linear", **how)


def _modulation(path: str, name: str, **how: Any) -> tuple[Rule, Rule]:
    return layer(path, name, axis=1, **how)


def single_file_rules(model: MMDiT) -> tuple[Rule, ...]:
    """The names of the published single files (after their prefix)."""
    return (
        *layer("patch_embed", "x_embedder.proj", patches(model.patch_size)),
        *(rule for path, name in (("t_embed", "t_embedder"), ("pooled_embed", "y_embedder"))
          for fc, number in (("fc1", 0), ("fc2", 2)) for rule in layer(f"{path}/{fc}", f"{name}.mlp.{number}")),
        *layer("context_embed", "context_embedder"),
        *(rule for group in model.groups for rule in _single_file_group(group.name, group.first)),
        *layer("final_adaln", "final_layer.adaLN_modulation.1"),
        *layer("final_linear", "final_layer.linear"),
    )  # fmt: skip


def _single_file_group(name: str, first: int) -> Iterator[Rule]:
    how: dict[str, Any] = {"first": first}
    for stream, prefix, there in (("x", "", "x_block"), ("context", "context_", "context_block")):
        block = f"joint_blocks.*.{there}"
        yield from layer(f"{name}/(attn2?)/{prefix}qkv", rf"{block}.\1.qkv", **how)
        yield from layer(f"{name}/(attn2?)/{prefix}proj", rf"{block}.\1.proj", linear(in_axes=2), **how)
        yield Rule(f"{name}/attn/{prefix}norm/([qk])/scale", rf"{block}.attn.ln_\1.weight", **how)
        yield from layer(rf"{name}/{prefix}mlp/(fc\d)", rf"{block}.mlp.\1", **how)
        yield from layer(f"{name}_{stream}_adaln", f"{block}.adaLN_modulation.1", axis=1, **how)
    yield Rule(f"{name}/attn2/queries_keys/([qk])/scale", r"joint_blocks.*.x_block.attn2.ln_\1.weight", **how)


def names_of(model: MMDiT, single_file: bool) -> tuple[tuple[Rule, ...], dict[str, Constant]]:
    """The rules of a model's parameters, and the positions that both formats store."""
    side, base = model.positions_side, model.positions_base
    table = cropped_positions(side, side, model.hidden_size, side, base)[None]
    what = f"the 2D sine-cosine table of {side} x {side} positions, {base}/{side} apart"
    name = "pos_embed" if single_file else "pos_embed.pos_embed"
    rules = single_file_rules(model) if single_file else diffusers_rules(model)
    return rules, {name: Constant(table, what)}


def _shapes(model: MMDiT, context: int, pooled: int) -> dict[str, Any]:
    x = jax.ShapeDtypeStruct((1, *model.latent_size, model.in_channels), np.float32)
    text = {
        "context": jax.ShapeDtypeStruct((1, 1, context), np.float32),
        "pooled": jax.ShapeDtypeStruct((1, pooled), np.float32),
    }
    time = jax.ShapeDtypeStruct((1,), np.float32)
    return jax.eval_shape(model.plain().init, jax.random.key(0), x, time, text)["params"]


def params_from_state_dict(state_dict: Mapping[str, Any], model: MMDiT) -> dict[str, Any]:
    """Our parameters from a state dict (name -> array) by diffusers' names, or by the single files' (with or without
    their prefix).

    Raises `keymap.MismatchError`, a ValueError, that lists every missing, unexpected and misshapen tensor, and when
    the stored positions are not the model's.
    """
    arrays = {name: np.asarray(value, np.float32) for name, value in state_dict.items()}
    if any(
        name.startswith(SINGLE_FILE_PREFIX) for name in arrays
    ):  # the autoencoder and the encoders lie beside it
        arrays = {
            name.removeprefix(SINGLE_FILE_PREFIX): value
            for name, value in arrays.items()
            if name.startswith(SINGLE_FILE_PREFIX)
        }
    single_file = any(name.startswith("joint_blocks.") for name in arrays)
    rules, constants = names_of(model, single_file)
    text = [arrays.get(f"{name}.weight") for name in (
        ("context_embedder", "y_embedder.mlp.0") if single_file
        else ("context_embedder", "time_text_embed.text_embedder.linear_1")
    )]  # fmt: skip
    context, pooled = (4096 if a is None else a.shape[-1] for a in text)
    return keymap.to_flax(arrays, _shapes(model, context, pooled), rules, "the state dict", constants)


def state_dict_from_params(
    params: Mapping[str, Any], model: MMDiT, single_file: bool = False
) -> dict[str, np.ndarray]:
    """The state dict of our parameters, positions included: the inverse of `params_from_state_dict`."""
    return keymap.to_torch(params, *names_of(model, single_file))
