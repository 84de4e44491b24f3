"""diffusers' DiTPipeline: a folder, or a hub id such as facebook/DiT-XL-2-256, to and from our weights.

    model_index.json                 which classes the parts are of, and id2label: the classes' names
    transformer/config.json          with the weights in one safetensors file, or a pickle in older repositories
    vae/                             the autoencoder (`dit_jax.interop.diffusers`)
    scheduler/scheduler_config.json  the noise schedule and what the network predicts

Weights of this format are computed with diffusers' constants: `config.model.convention`.
Letters: D width, L layers, H heads, K channels of a head.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from dit_jax import paths
from dit_jax.config import Config, ConfigError, DiTConfig, GaussianConfig
from dit_jax.config.saved import shown
from dit_jax.files import write_whole
from dit_jax.interop import diffusers, keymap
from dit_jax.interop.keymap import LINEAR, Rule, layer, linear, patches
from dit_jax.interop.tensor_files import weight_files, write_safetensors
from dit_jax.interop.weights import Latents, Reading, Weights, latents_of, shapes_of, sized
from dit_jax.models.autoencoder_kl import AutoencoderKLConfig

INDEX = "model_index.json"
TRANSFORMER, SCHEDULER = "transformer", "scheduler/scheduler_config.json"
FILES = [INDEX, SCHEDULER, f"{TRANSFORMER}/config.json", f"vae/{diffusers.CONFIG_FILE}"]
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
BETAS = (1e-4, 0.02)  # of 1,000 timesteps (arXiv 2006.11239, section 4)

NULL_CLASS = 1000  # in DiTPipeline, whatever the network
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # today's name and the older

_SIZES = {
    "sample_size": 32, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4,
    "out_channels": None, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip
# What the network is, where diffusers would let it be something else.
_FIXED: dict[str, Any] = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "dropout": 0.0,
    "norm_elementwise_affine": False, "norm_eps": 1e-5, "norm_type": "ada_norm_zero", "norm_num_groups": 32,
    "upcast_attention": False,
}  # fmt: skip
_EMBEDDERS = "transformer_blocks.#.norm1.emb"  # each block has a copy


def rules(patch_size: int, depth: int) -> tuple[Rule, ...]:
    """diffusers' names of a model's parameters."""
    copies: dict[str, Any] = {"copies": depth}
    return (
        *layer("patch_embed", "pos_embed.proj", patches(patch_size)),
        *layer("t_embed/fc1", f"{_EMBEDDERS}.timestep_embedder.linear_1", **copies),
        *layer("t_embed/fc2", f"{_EMBEDDERS}.timestep_embedder.linear_2", **copies),
        Rule("y_embed/embedding", f"{_EMBEDDERS}.class_embedder.embedding_table.weight", **copies),
        *layer("blocks/attn/qkv", "transformer_blocks.*.attn1.to_{q,k,v}", LINEAR),  # (L, D, 3, H, K)
        *layer("blocks/attn/proj", "transformer_blocks.*.attn1.to_out.0", linear(in_axes=2)),  # (L, H, K, D)
        *layer("blocks/mlp/fc1", "transformer_blocks.*.ff.net.0.proj"),
        *layer("blocks/mlp/fc2", "transformer_blocks.*.ff.net.2"),
        *layer("adaln", "transformer_blocks.*.norm1.linear", axis=1),  # (D, L, 6, D)
        *layer("final_adaln", "proj_out_1"),  # (D, 2, D)
        *layer("final_linear", "proj_out_2"),
    )


# -------------------------------------------------------------------------------------------- reading


def read_pipeline(place: str, folder: pathlib.Path, reading: Reading) -> Weights:
    """The weights of a pipeline that lies in `folder`; `place` is what the user calls it.

    Raises ConfigError, naming the file, where one is missing, damaged, or of another architecture.
    """
    index, file = read_json(folder / INDEX), folder / TRANSFORMER / "config.json"
    names = index.get("id2label") or {}
    diffusion = _process(read_json(folder / SCHEDULER), str(folder / SCHEDULER))
    config = _config(read_json(file), diffusion, str(file))
    files = weight_files(file.parent, diffusers.WEIGHTS_FILE)
    if not files and (weights := diffusers.weights_file(file.parent)) is not None:
        files = [weights]
    if not files:
        raise ConfigError(
            f"{file.parent} has no {diffusers.WEIGHTS_FILE}, nor an index of it; expected the weights"
        )
    m = config.model
    assert m.patch_size and m.depth
    try:
        tensors = {name: tensor for part in files for name, tensor in diffusers.read_weights(part).items()}
        where = str(files[0] if len(files) == 1 else file.parent)
        params = keymap.to_flax(tensors, shapes_of(config), rules(m.patch_size, m.depth), where)
    except keymap.MismatchError as error:
        raise ConfigError(str(error)) from None
    config, params = _without_padding(config, params, len(names))
    label_names = tuple(str(names.get(str(i), i)) for i in range(config.model.num_classes)) if names else ()
    hub = not paths.is_folder(paths.from_user(place))
    return Weights(
        config,
        params,
        place if hub else folder.name,
        latents_of(reading.vae, m.input_size[0])
        if reading.vae
        else latents_in(folder, place if hub else str(folder.absolute()), m.input_size[0]),
        () if label_names == tuple(map(str, range(len(label_names)))) else label_names,
    )


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """What a file of JSON says; ConfigError where it is missing or none."""
    try:
        found = json.loads(paths.read_bytes(file).decode())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); expected JSON") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds a {type(found).__name__}; expected an object of options")
    return found


def _config(found: dict[str, Any], diffusion: GaussianConfig, where: str) -> Config:
    """The config of a transformer/config.json."""
    name = found.get("_class_name")
    if name not in CLASSES:
        raise ConfigError(f"{where} is of a {str(name)[:80]}; expected {' or '.join(CLASSES)}")
    for key, expected in _FIXED.items():
        if found.get(key, expected) != expected:
            raise ConfigError(f"{where} has {key} {shown(found[key])}; expected {shown(expected)}")
    given: dict[str, Any] = {key: found.get(key, default) for key, default in _SIZES.items()}
    given["out_channels"] = given["in_channels"] if given["out_channels"] is None else given["out_channels"]
    for key, value in given.items():
        if type(value) is not int or not 0 < value < 2**20:
            raise ConfigError(f"{where} has {key} {shown(value)}; expected a number above 0")
    channels, outputs, side = given["in_channels"], given["out_channels"], given["sample_size"]
    if outputs not in (channels, 2 * channels):
        raise ConfigError(f"{where} has out_channels {outputs}; expected {channels} or {2 * channels}")
    heads = given["num_attention_heads"]
    return sized(
        given["num_layers"], heads * given["attention_head_dim"], heads, given["patch_size"],
        dataclasses.replace(diffusion, learn_sigma=outputs != channels), where,
        input_size=(side, side), in_channels=channels, num_classes=given["num_embeds_ada_norm"],
        convention="diffusers",
    )  # fmt: skip


def _process(found: dict[str, Any], where: str) -> GaussianConfig:
    """The process of a scheduler_config.json, whichever scheduler it is of."""
    steps, schedule = found.get("num_train_timesteps", 1000), found.get("beta_schedule", "linear")
    if type(steps) is not int or schedule not in ("linear", "squaredcos_cap_v2"):
        raise ConfigError(
            f"{where} has {shown(steps)} timesteps of beta_schedule {shown(schedule)}; expected linear or "
            "squaredcos_cap_v2"
        )
    expected = dict(
        zip(("beta_start", "beta_end"), (1000 / max(steps, 1) * beta for beta in BETAS), strict=True)
    )
    for key, beta in expected.items() if schedule == "linear" else ():
        value = found.get(key, beta)
        if not (isinstance(value, float | int) and math.isclose(value, beta, rel_tol=1e-6)):
            raise ConfigError(f"{where} has {key} {shown(value)}; expected {beta:g}")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if found.get(key):
            raise ConfigError(f"{where} has {key}; expected the plain schedule {schedule}")
    kinds = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    prediction = found.get("prediction_type", "epsilon")
    if prediction not in kinds:
        raise ConfigError(f"{where} has prediction_type {shown(prediction)}; expected {' or '.join(kinds)}")
    return GaussianConfig(schedule=schedule, num_timesteps=steps, prediction=kinds[prediction])  # type: ignore[arg-type]


def latents_in(folder: pathlib.Path, place: str, side: int) -> Latents:
    """The latents of this side by the autoencoder of a pipeline in a folder, which users call `place`."""
    try:
        config = diffusers.read_config(folder / "vae" / diffusers.CONFIG_FILE)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the pipeline's autoencoder cannot be read: {error}") from None
    scaling, shift = float(config.scaling_factor), float(config.shift_factor or 0.0)
    return Latents(place, config.downsample_factor * side, scaling, shift)


# -------------------------------------------------------------------------------------------- writing


def write_pipeline(folder: pathlib.Path, weights: Weights) -> None:
    """Write a pipeline's files into a folder, its autoencoder among them.

    Raises ConfigError for a network or a process that DiTPipeline does not have.
    """
    config = _with_padding(_writable(weights.config))
    m, d = config.model, config.diffusion
    assert m.patch_size and m.depth and isinstance(d, GaussianConfig)
    try:
        vae = diffusers.copy_autoencoder(weights.latents.vae, folder / "vae")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the pipeline needs the autoencoder, but {error}; expected --vae, where it lies"
        ) from None
    check_autoencoder(vae, weights)
    if weights.latents.shift_factor:
        raise ConfigError(
            f"the latents are shifted by {weights.latents.shift_factor}, which DiTPipeline does not undo"
        )
    params = _padded(weights.params, m.num_classes)
    names = weights.label_names or tuple(map(str, range(weights.config.model.num_classes)))
    sizes = {
        "sample_size": m.input_size[0], "num_layers": m.depth, "num_attention_heads": m.num_heads,
        "attention_head_dim": m.head_dim, "in_channels": m.in_channels, "patch_size": m.patch_size,
        "out_channels": m.in_channels * (2 if d.learn_sigma else 1), "num_embeds_ada_norm": m.num_classes,
    }  # fmt: skip
    scheduler: dict[str, Any] = {
        "num_train_timesteps": d.num_timesteps, "beta_schedule": d.schedule,
        "prediction_type": PREDICTIONS[d.prediction], "clip_sample": False,
    }  # fmt: skip
    if d.schedule == "linear":
        scheduler |= {
            "beta_start": 1000 / d.num_timesteps * BETAS[0],
            "beta_end": 1000 / d.num_timesteps * BETAS[1],
        }
    index = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "id2label": {str(i): name for i, name in enumerate(names)},
    }
    for file, kind, content in (
        (TRANSFORMER + "/config.json", CLASSES[0], _FIXED | sizes),
        (SCHEDULER, "DDIMScheduler", scheduler),
        (INDEX, "DiTPipeline", index),
    ):
        write_whole(folder / file, json.dumps({"_class_name": kind, **content}, indent=2) + "\n")
    tensors = keymap.to_torch(params, rules(m.patch_size, m.depth))
    write_safetensors(folder / TRANSFORMER / diffusers.WEIGHTS_FILE, tensors)


def _writable(config: Config) -> Config:
    """The config, of which DiTPipeline has the network; ConfigError for another."""
    m = config.model
    wrong = {
        "diffusion.kind": (config.diffusion.kind, "gaussian"),
        "text.encoder": (config.text.encoder, ""),
        "model.conditioning": (m.conditioning, "adaln_zero"),
        "model.mlp_ratio": (m.mlp_ratio, 4.0),
        "model.input_size": (m.input_size, (m.input_size[0],) * 2),
    }
    for option, (found, expected) in wrong.items():
        if found != expected:
            raise ConfigError(f"--{option.replace('_', '-')} is {found}; DiTPipeline needs {expected}")
    if not 0 < m.num_classes <= NULL_CLASS or m.class_dropout_prob == 0:
        raise ConfigError(
            f"--model.num-classes is {m.num_classes} with --model.class-dropout-prob {m.class_dropout_prob}; "
            f"DiTPipeline needs 1 to {NULL_CLASS} classes and a null, which it takes to be class {NULL_CLASS}"
        )
    return config


def check_autoencoder(vae: AutoencoderKLConfig, weights: Weights) -> None:
    """Raises ConfigError where an autoencoder is not that of the weights' latents."""
    m, latents = weights.config.model, weights.latents
    found = (vae.latent_channels, float(vae.scaling_factor), float(vae.shift_factor or 0.0))
    if found != (m.in_channels, latents.scaling_factor, latents.shift_factor):
        raise ConfigError(
            f"the autoencoder {latents.vae} has (channels, scaling, shift) {found}; the weights are of latents of "
            f"{(m.in_channels, latents.scaling_factor, latents.shift_factor)}"
        )


# --------------------------------------------------------- the classes between the last one and the null
# DiTPipeline takes class 1000 for none, whatever the network. Fewer classes are filled up with the null's row.


def _with_padding(config: Config) -> Config:
    return _with_classes(config, NULL_CLASS)


def _with_classes(config: Config, num_classes: int) -> Config:
    assert isinstance(config.model, DiTConfig)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=num_classes))


def _padded(params: dict[str, Any], num_classes: int) -> dict[str, Any]:
    table = np.asarray(params["y_embed"]["embedding"])
    missing = np.repeat(table[-1:], num_classes + 1 - len(table), axis=0)
    return {**params, "y_embed": {"embedding": np.concatenate([table, missing])}}


def _without_padding(config: Config, params: dict[str, Any], named: int) -> tuple[Config, dict[str, Any]]:
    """Config and parameters without the rows after the last class that has a name, if they are all the null's."""
    table = params["y_embed"]["embedding"]
    if not 0 < named < config.model.num_classes or (table[named:] != table[-1]).any():
        return config, params
    return (
        _with_classes(config, named),
        {**params, "y_embed": {"embedding": table[: named + 1].copy()}},
    )
