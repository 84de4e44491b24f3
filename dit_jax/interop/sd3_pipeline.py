"""diffusers' StableDiffusion3Pipeline: a folder or hub id, and the published single file, to and from our weights.

    model_index.json                 which classes the parts are of
    transformer/config.json          with the weights in one safetensors file, or in several that an index names
    vae/                             the autoencoder (`dit_jax.interop.diffusers`)
    scheduler/scheduler_config.json  the shift of its times
    text_encoder*/, tokenizer*/      of captions (`dit_jax.text.sd3`)

A single file holds the network under the prefix model.diffusion_model.; its sizes are those of the tensors.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import shutil
from typing import Any

from dit_jax import paths
from dit_jax.config import Config, ConfigError, FlowMatchingConfig, MMDiTConfig, TextConfig, resolve
from dit_jax.config.check import HEAD_DIM
from dit_jax.config.networks import MMDIT_SIZES
from dit_jax.config.saved import shown
from dit_jax.config.text import CLIP_LENGTH, SD3, SD3_FOLDERS, SD3_PLACE
from dit_jax.files import write_whole
from dit_jax.interop import diffusers, keymap, sd3
from dit_jax.interop.pipeline import INDEX, SCHEDULER, TRANSFORMER, check_autoencoder, latents_in, read_json
from dit_jax.interop.tensor_files import Tensors, read_safetensors, weight_files, write_safetensors
from dit_jax.interop.weights import Reading, Weights, latents_of, name_of, shapes_of
from dit_jax.models.create import build_model
from dit_jax.models.mmdit import MMDiT

PIPELINE, NETWORK = "StableDiffusion3Pipeline", "SD3Transformer2DModel"
CLIP_CONFIGS = ["text_encoder/config.json", "text_encoder_2/config.json"]
FILES = [
    *CLIP_CONFIGS,
    f"{TRANSFORMER}/{diffusers.WEIGHTS_FILE}.index.json",
    f"{TRANSFORMER}/diffusion_pytorch_model-*-of-*.safetensors",
]
"""Of a hub's repository, beside those of other pipelines."""

T5_LENGTH = 256  # tokens that the pipeline gives T5 unless it is told otherwise
TIMESTEPS = 1000
_SIZES = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 18,
    "attention_head_dim": HEAD_DIM, "num_attention_heads": 18, "joint_attention_dim": 4096,
    "caption_projection_dim": 1152, "pooled_projection_dim": 2048, "pos_embed_max_size": 96,
}  # fmt: skip
_PLAIN_TIMES = (
    "use_dynamic_shifting", "invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas",
    "use_beta_sigmas",
)  # fmt: skip
_CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["diffusers", NETWORK],
    "vae": ["diffusers", "AutoencoderKL"],
}


def is_sd3(index: dict[str, Any]) -> bool:
    """Whether a model_index.json is of this pipeline."""
    return index.get("_class_name") == PIPELINE


# -------------------------------------------------------------------------------------------- reading


def read_sd3_pipeline(place: str, folder: pathlib.Path, reading: Reading) -> Weights:
    """The weights of a pipeline that lies in `folder`; `place` is what the user calls it.

    Raises ConfigError, naming the file, where one is missing, damaged, or of another architecture.
    """
    file = folder / TRANSFORMER / "config.json"
    shift = _shift(folder / SCHEDULER)
    config = _config(read_json(file), _clip_widths(folder), shift, str(file))
    files = weight_files(file.parent, diffusers.WEIGHTS_FILE)
    if not files:
        raise ConfigError(
            f"{file.parent} has no {diffusers.WEIGHTS_FILE}, nor an index of it; expected the weights"
        )
    tensors: Tensors = {}
    for part in files:
        tensors |= read_safetensors(part)
    hub = not paths.is_folder(paths.from_user(place))
    here, side = place if hub else str(folder.absolute()), config.model.input_size[0]
    latents = latents_of(reading.vae, side) if reading.vae else latents_in(folder, here, side)
    params = _params(tensors, config, str(file.parent))
    return Weights(config, params, place if hub else folder.name, latents, texts=here)


def read_single_file(file: pathlib.Path, tensors: Tensors, reading: Reading) -> Weights:
    """The weights of a published file of tensors; ConfigError where its network is another."""
    inner = {
        name.removeprefix(sd3.SINGLE_FILE_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(sd3.SINGLE_FILE_PREFIX)
    } or tensors
    config = _config_of_shapes(inner, str(file))
    params = _params(inner, config, str(file), single_file=True)
    latents = latents_of(reading.vae or SD3_PLACE, config.model.input_size[0])
    if not reading.vae:  # not to be had before it is needed
        latents = type(latents)(SD3_PLACE, latents.image_size, 1.5305, 0.0609)
    return Weights(config, params, name_of(file), latents, texts=SD3_PLACE)


def holds_sd3(tensors: Tensors) -> bool:
    """Whether tensors have the names of a published single file."""
    return any(
        re.match(rf"({re.escape(sd3.SINGLE_FILE_PREFIX)})?joint_blocks\.0\.", name) for name in tensors
    )


def _params(tensors: Tensors, config: Config, where: str, single_file: bool = False) -> dict[str, Any]:
    model = build_model(config)
    assert isinstance(model, MMDiT)
    try:
        rules, constants = sd3.names_of(model, single_file)
        return keymap.to_flax(tensors, shapes_of(config), rules, where, constants)
    except keymap.MismatchError as error:
        raise ConfigError(str(error)) from None


def _config(found: dict[str, Any], widths: tuple[int, int] | None, shift: float, where: str) -> Config:
    """The config of a transformer/config.json."""
    if found.get("_class_name") != NETWORK:
        raise ConfigError(f"{where} is of a {str(found.get('_class_name'))[:80]}; expected {NETWORK}")
    given: dict[str, Any] = {key: found.get(key, default) for key, default in _SIZES.items()}
    for key, value in given.items():
        if type(value) is not int or not 0 < value < 2**20:
            raise ConfigError(f"{where} has {key} {shown(value)}; expected a number above 0")
    heads, width = given["num_attention_heads"], given["num_attention_heads"] * given["attention_head_dim"]
    norm, dual = found.get("qk_norm"), list(found.get("dual_attention_layers") or ())
    pooled = given["pooled_projection_dim"]
    expected = {
        "out_channels": given["in_channels"], "caption_projection_dim": width,
        "qk_norm": norm if norm in (None, "rms_norm") else "rms_norm",
        "dual_attention_layers": list(range(len(dual))),
    }  # fmt: skip
    for key, value in expected.items():
        if (dual if key == "dual_attention_layers" else found.get(key, given.get(key))) != value:
            raise ConfigError(f"{where} has {key} {shown(found.get(key))}; expected {shown(value)}")
    if widths is None:
        widths = (768, pooled - 768) if pooled > 768 else (pooled // 2, pooled - pooled // 2)
    if sum(widths) != pooled:
        raise ConfigError(
            f"{where} has pooled_projection_dim {pooled}; expected {sum(widths)}, as wide as both CLIPs"
        )
    return _resolved(
        where, shift, depth=given["num_layers"], width=width, heads=heads, patch=given["patch_size"],
        qk_norm=norm is not None, dual=len(dual), table=given["pos_embed_max_size"],
        side=given["sample_size"], channels=given["in_channels"], context=given["joint_attention_dim"],
        widths=widths,
    )  # fmt: skip


def _config_of_shapes(tensors: Tensors, where: str) -> Config:
    """The config that the tensors of a published file tell; its shift is that of all published networks but one."""
    need = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        "context_embedder.weight": 2,
        "y_embedder.mlp.0.weight": 2,
    }
    for name, axes in need.items():
        if name not in tensors or tensors[name].ndim != axes:
            raise ConfigError(f"{where} has no {name} of {axes} axes; expected the tensors of an MMDiT")
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    found = {int(match[1]) for name in tensors if (match := re.match(r"joint_blocks\.(\d{1,4})\.", name))}
    dual = {
        int(match[1]) for name in tensors if (match := re.match(r"joint_blocks\.(\d+)\.x_block\.attn2", name))
    }
    pooled = tensors["y_embedder.mlp.0.weight"].shape[1]
    return _resolved(
        where, 3.0, depth=len(found), width=width, heads=max(1, width // HEAD_DIM), patch=patch,
        qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in tensors, dual=len(dual),
        table=math.isqrt(tensors["pos_embed"].shape[1]), side=64 * patch, channels=channels,
        context=tensors["context_embedder.weight"].shape[1],
        widths=(768, pooled - 768) if pooled > 768 else (pooled // 2, pooled - pooled // 2),
    )  # fmt: skip


def _resolved(
    where: str, shift: float, *, depth: int, width: int, heads: int, patch: int, qk_norm: bool, dual: int,
    table: int, side: int, channels: int, context: int, widths: tuple[int, int],
) -> Config:  # fmt: skip
    sizes = (depth, qk_norm, dual, table)
    name = next((name for name, of in MMDIT_SIZES.items() if of == sizes and width == HEAD_DIM * depth), None)
    try:
        return resolve(
            Config(
                model=MMDiTConfig(
                    name=name or f"MMDiT-{depth}", depth=depth, hidden_size=width, num_heads=heads, patch_size=patch,
                    qk_norm=qk_norm, dual_blocks=dual, positions_side=table, positions_base=side // patch,
                    input_size=(side, side), in_channels=channels,
                ),
                text=TextConfig(SD3, CLIP_LENGTH + T5_LENGTH, context, widths),
                diffusion=FlowMatchingConfig(time_scale=TIMESTEPS, time_direction="to_noise", shift=shift),
            )
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{where} cannot be used: {error}") from None


def _clip_widths(folder: pathlib.Path) -> tuple[int, int] | None:
    """Channels of the two CLIPs; None where they do not lie there."""
    files = [folder / name for name in CLIP_CONFIGS]
    if not all(paths.is_file(file) for file in files):
        return None
    first, second = (read_json(file).get("projection_dim") for file in files)
    if type(first) is not int or type(second) is not int:
        raise ConfigError(
            f"{files[0]} and {files[1]} have no projection_dim; expected the width of each CLIP"
        )
    return first, second


def _shift(file: pathlib.Path) -> float:
    """The shift of a scheduler_config.json."""
    found = read_json(file)
    for key in _PLAIN_TIMES:
        if found.get(key):
            raise ConfigError(f"{file} has {key} {shown(found[key])}; expected a shift alone")
    steps, shift = found.get("num_train_timesteps", TIMESTEPS), found.get("shift", 1.0)
    if steps != TIMESTEPS or type(shift) not in (int, float) or not 0 < shift < 1e6:
        raise ConfigError(
            f"{file} has {shown(steps)} timesteps and shift {shown(shift)}; expected {TIMESTEPS} and a number above 0"
        )
    return float(shift)


# -------------------------------------------------------------------------------------------- writing


def write_sd3_pipeline(folder: pathlib.Path, weights: Weights) -> str:
    """Write a pipeline's files into a folder; what there is to say of it, empty where nothing is left out.

    The encoders of captions are copied where they lie in a folder. Raises ConfigError for a network or a process that
    the pipeline does not have.
    """
    m, shift = _writable(weights.config)
    try:
        vae = diffusers.copy_autoencoder(weights.latents.vae, folder / "vae")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the pipeline needs the autoencoder, but {error}; expected --vae, where it lies"
        ) from None
    check_autoencoder(vae, weights)
    index: dict[str, Any] = {"_class_name": PIPELINE, **_CLASSES}
    index |= _copied_texts(folder, weights.texts)
    text = weights.config.text
    assert m.positions_base and m.patch_size and m.dual_blocks is not None
    sizes = {
        "_class_name": NETWORK, "sample_size": m.positions_base * m.patch_size, "patch_size": m.patch_size,
        "in_channels": m.in_channels, "out_channels": m.in_channels, "num_layers": m.depth,
        "attention_head_dim": m.head_dim, "num_attention_heads": m.num_heads, "joint_attention_dim": text.channels,
        "caption_projection_dim": m.hidden_size, "pooled_projection_dim": text.pooled,
        "pos_embed_max_size": m.positions_side, "qk_norm": "rms_norm" if m.qk_norm else None,
        "dual_attention_layers": list(range(m.dual_blocks)),
    }  # fmt: skip
    scheduler = {"_class_name": _CLASSES["scheduler"][1], "num_train_timesteps": TIMESTEPS, "shift": shift}
    for name, content in ((INDEX, index), (f"{TRANSFORMER}/config.json", sizes), (SCHEDULER, scheduler)):
        write_whole(folder / name, json.dumps(content, indent=2) + "\n")
    model = build_model(weights.config)
    assert isinstance(model, MMDiT)
    tensors = sd3.state_dict_from_params(weights.params, model)
    write_safetensors(folder / TRANSFORMER / diffusers.WEIGHTS_FILE, tensors)
    missing = [name for name in SD3_FOLDERS if index[name] == [None, None]]
    return (
        f"without {', '.join(missing)}, which do not lie in a folder here: give from_pretrained those of "
        f"{weights.texts or SD3_PLACE}, or None"
        if missing
        else ""
    )


def _copied_texts(folder: pathlib.Path, place: str) -> dict[str, Any]:
    """Copy the encoders and tokenizers that lie in a folder; what a model_index.json says of all of them."""
    source = paths.to_path(os.path.expanduser(place))
    entries: dict[str, Any] = {name: [None, None] for name in SD3_FOLDERS}
    if not place or not paths.is_file(source / INDEX):
        return entries
    index = read_json(source / INDEX)
    for name in SD3_FOLDERS:
        if paths.is_folder(source / name) and isinstance(index.get(name), list):
            with paths.local_folder(source / name) as here:
                shutil.copytree(here, folder / name)
            entries[name] = index[name]
    return entries


def _writable(config: Config) -> tuple[MMDiTConfig, float]:
    """The network of a config and its shift, which the pipeline has; ConfigError for another."""
    m, d = config.model, config.diffusion
    assert isinstance(m, MMDiTConfig)
    if not isinstance(d, FlowMatchingConfig):
        raise ConfigError(f"--diffusion.kind is {d.kind}; {PIPELINE} needs flow")
    wrong = {
        "text.encoder": (config.text.encoder, SD3),
        "model.mlp_ratio": (m.mlp_ratio, 4.0),
        "diffusion.path": (d.path, "linear"),
        "diffusion.prediction": (d.prediction, "velocity"),
        "diffusion.time_scale": (d.time_scale, float(TIMESTEPS)),
        "diffusion.time_direction": (d.time_direction, "to_noise"),
    }
    for option, (found, expected) in wrong.items():
        if found != expected:
            raise ConfigError(f"--{option.replace('_', '-')} is {found}; {PIPELINE} needs {expected}")
    return m, d.shift
