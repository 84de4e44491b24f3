"""The published DiT checkpoints: their state dict to and from our parameters.

Names and layouts are those of the original PyTorch implementation (adaLN-Zero models): Linear weights are
(out, in), the patch projection is a convolution (D, C, P, P), blocks are numbered, positions are stored.

Letters: D width, L layers, H heads, K channels of a head, P patch side, C latent channels.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dit_jax import paths
from dit_jax.config import Config, ConfigError, FlowMatchingConfig, GaussianConfig, ProcessConfig
from dit_jax.interop import keymap
from dit_jax.interop.imagenet import class_names
from dit_jax.interop.keymap import Constant, MismatchError, Rule, layer, linear, patches
from dit_jax.interop.tensor_files import TensorFile, Tensors, write_pickled
from dit_jax.interop.weights import SD_AUTOENCODER, Reading, Weights, latents_of, name_of, sized
from dit_jax.models.create import build_model
from dit_jax.models.dit import DiT
from dit_jax.models.embeddings import sincos_positions


def rules(patch_size: int) -> tuple[Rule, ...]:
    """The published names of a model's parameters."""
    return (
        *layer("patch_embed", "x_embedder.proj", patches(patch_size)),
        *layer("t_embed/fc1", "t_embedder.mlp.0"),
        *layer("t_embed/fc2", "t_embedder.mlp.2"),
        Rule("y_embed/embedding", "y_embedder.embedding_table.weight"),
        *layer("blocks/attn/qkv", "blocks.*.attn.qkv"),  # (L, D, 3, H, K)
        *layer("blocks/attn/proj", "blocks.*.attn.proj", linear(in_axes=2)),  # (L, H, K, D)
        *layer(r"blocks/mlp/(fc\d)", r"blocks.*.mlp.\1"),
        *layer("adaln", "blocks.*.adaLN_modulation.1", axis=1),  # (D, L, 6, D)
        *layer("final_adaln", "final_layer.adaLN_modulation.1"),  # (D, 2, D)
        *layer("final_linear", "final_layer.linear"),
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


# ---------------------------------------------------------------------------------------------- files

PROJECTION, TABLE, LAST = (
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
)


def read_published(file: paths.Named, found: TensorFile, reading: Reading) -> Weights:
    """The weights of a published DiT or SiT, bare or as training leaves them: {model, ema, opt, args}.

    Sizes are those of the tensors, heads those of the table of sizes. Raises ConfigError, naming the file, where it
    is cut, holds something else, or sizes alone do not tell the network.
    """
    if reading.config is not None and reading.process is not None:
        raise ConfigError(
            f"--process is {reading.process} with --config, which has a process; expected one of them"
        )
    name = {"ema": "ema", "params": "model", None: "ema"}[reading.which] if "" not in found.sets else ""
    if name not in found.sets or (name == "" and reading.which == "params"):
        kinds = ", ".join(key or "one set of weights" for key in found.sets)
        raise ConfigError(
            f"--weights is {reading.which or 'ema'}, but {file} holds {kinds}; expected what it holds"
        )
    tensors = found.arrays(name)
    config = reading.config or config_of(tensors, found.args, reading.process, str(file))
    try:
        params = params_from_state_dict(tensors, _dit(config))
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None
    m = config.model
    if reading.vae is None and m.in_channels != 4:
        raise ConfigError(
            f"{file} is of latents with {m.in_channels} channels; expected --vae, their autoencoder"
        )
    return Weights(
        config,
        params,
        name_of(file),
        latents_of(reading.vae or SD_AUTOENCODER, m.input_size[0]),
        class_names() if m.num_classes == 1000 else (),
    )


def _dit(config: Config) -> DiT:
    model = build_model(config)
    if not isinstance(model, DiT) or model.text is not None:
        raise ConfigError(
            "the published .pt format is that of a DiT with labels; expected --to diffusers or folder"
        )
    return model


def write_published(file: paths.Named, weights: Weights) -> None:
    """Write the bare state dict that the published programs load."""
    model = _dit(weights.config)
    try:
        tensors = state_dict_from_params(weights.params, model)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    write_pickled(file, tensors)


def config_of(tensors: Tensors, args: Mapping[str, Any], process: str | None, where: str) -> Config:
    """The config that the tensors' shapes and the stored options tell; `where` is the file, for errors."""
    for name, axes in ((PROJECTION, 4), (TABLE, 2), (LAST, 2), ("pos_embed", 3)):
        if name not in tensors or tensors[name].ndim != axes:
            some = ", ".join(sorted(tensors)[:3]) or "none"
            raise ConfigError(
                f"{where} has no {name} of {axes} axes, but {some}, ...; expected a DiT's or SiT's tensors"
            )
    width, channels, patch, _ = tensors[PROJECTION].shape
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d{1,4})\.", name))}
    outputs = tensors[LAST].shape[0] // patch**2
    if outputs not in (channels, 2 * channels):
        raise ConfigError(f"{where} has {outputs} channels of output; expected {channels} or {2 * channels}")
    side = patch * math.isqrt(tensors["pos_embed"].shape[1])
    hidden = tensors.get("blocks.0.mlp.fc1.weight", np.empty((4 * width, 0))).shape[0]
    return sized(
        len(blocks), width, None, patch, _process(args, process, outputs != channels, where), where,
        input_size=(side, side), in_channels=channels, num_classes=tensors[TABLE].shape[0] - 1,
        mlp_ratio=hidden / width,
    )  # fmt: skip


def _process(args: Mapping[str, Any], process: str | None, learn_sigma: bool, where: str) -> ProcessConfig:
    told = process or ("sit" if "path_type" in args else None)
    if told is None and (not learn_sigma or os.path.basename(where).lower().startswith("sit")):
        like = (
            "is named like a SiT"
            if learn_sigma
            else "has as many channels of output as of input, as SiTs have"
        )
        raise ConfigError(
            f"{where} {like}, which has a DiT's names and shapes; expected --process sit or --process dit"
        )
    if told != "sit":
        return GaussianConfig(learn_sigma=learn_sigma)
    path, prediction = str(args.get("path_type", "linear")).lower(), str(args.get("prediction", "velocity"))
    if path not in ("linear", "gvp", "vp") or prediction not in ("velocity", "score", "noise"):
        raise ConfigError(
            f"{where} is of path {path[:40]!r} and prediction {prediction[:40]!r}; expected SiT's"
        )
    return FlowMatchingConfig(path=path, prediction=prediction, learn_sigma=learn_sigma)  # type: ignore[arg-type]
