"""Autoencoders in diffusers' format, without torch: a folder with config.json and a safetensors file.

A place is named by a folder, by a hub id such as `stabilityai/sd-vae-ft-mse`, or by `digits`, the small
autoencoder that ships with this package. A pipeline's folder is one too: its autoencoder lies in `vae/`.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np

from dit_jax import paths
from dit_jax.files import whole_file
from dit_jax.interop import keymap
from dit_jax.interop.keymap import CONV, LINEAR, Rule
from dit_jax.interop.tensor_files import read_safetensors, read_tensor_file
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PICKLED_FILE = "diffusion_pytorch_model.bin"  # what older repositories have in its place
PIPELINE_SUBFOLDER = "vae"

# Flax joins the index of a list with "_", torch with "."; the rest of the names is diffusers'.
_PART = r"(encoder|decoder)"
_BLOCK = rf"{_PART}/(down|up)_blocks_(\d+)"
_ATTENTION = rf"{_PART}/mid_block/attentions_0"


def _layer(pattern: str, name: str, layout: keymap.Layout) -> tuple[Rule, Rule]:
    return Rule(f"{pattern}/kernel", f"{name}.weight", layout), Rule(f"{pattern}/bias", f"{name}.bias")


def _norm(pattern: str, name: str) -> tuple[Rule, Rule]:
    return Rule(f"{pattern}/scale", f"{name}.weight"), Rule(f"{pattern}/bias", f"{name}.bias")


AUTOENCODER_KL_RULES: tuple[Rule, ...] = (
    *_layer(r"(quant_conv|post_quant_conv)", r"\1", CONV),
    *_layer(rf"{_PART}/(conv_in|conv_out)", r"\1.\2", CONV),
    *_norm(rf"{_PART}/conv_norm_out", r"\1.conv_norm_out"),
    *_layer(rf"{_BLOCK}_(down|up)sample", r"\1.\2_blocks.\3.\4samplers.0.conv", CONV),
    *_layer(rf"{_BLOCK}_resnets_(\d+)/(conv\w+)", r"\1.\2_blocks.\3.resnets.\4.\5", CONV),
    *_norm(rf"{_BLOCK}_resnets_(\d+)/(norm\d)", r"\1.\2_blocks.\3.resnets.\4.\5"),
    *_layer(rf"{_PART}/mid_block/resnets_(\d+)/(conv\w+)", r"\1.mid_block.resnets.\2.\3", CONV),
    *_norm(rf"{_PART}/mid_block/resnets_(\d+)/(norm\d)", r"\1.mid_block.resnets.\2.\3"),
    *_norm(rf"{_ATTENTION}/group_norm", r"\1.mid_block.attentions.0.group_norm"),
    *_layer(rf"{_ATTENTION}/(to_[qkv])", r"\1.mid_block.attentions.0.\2", LINEAR),
    *_layer(rf"{_ATTENTION}/to_out", r"\1.mid_block.attentions.0.to_out.0", LINEAR),
)

# Names of the attention layers in files written before diffusers 0.17.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def asset_path(name: str) -> pathlib.Path:
    """Folder of an asset that ships with the package, such as `digits_vae`."""
    return pathlib.Path(__file__).resolve().parent.parent / "assets" / name


def load_autoencoder_kl(
    path_or_id: str | os.PathLike[str], subfolder: str | None = None
) -> tuple[AutoencoderKL, dict[str, Any]]:
    """An autoencoder and its float32 parameters from diffusers' format (weights in float32 or float16).

    path_or_id: a folder, a hub id, or `digits`. subfolder: where in it the files lie; None looks in the
    folder itself and then in `vae/`. Raises FileNotFoundError where there is no such folder or file, and
    ValueError, naming the file and listing the tensors, where config or weights do not fit.
    """
    file = _locate(path_or_id, subfolder)
    model = AutoencoderKL(read_config(file.parent / CONFIG_FILE))
    state_dict = {_new_name(name): tensor for name, tensor in read_weights(file).items()}
    return model, keymap.to_flax(state_dict, shapes(model), AUTOENCODER_KL_RULES, str(file))


def save_autoencoder_kl(
    path: paths.Named, model: AutoencoderKL, params: dict[str, Any], dtype: Any = np.float32
) -> None:
    """Write an autoencoder as a diffusers folder, weights as `dtype`; no file is ever half written."""
    import safetensors.numpy

    folder = paths.to_path(path)
    state_dict = keymap.to_torch(params, AUTOENCODER_KL_RULES)
    keymap.to_flax(
        state_dict, shapes(model), AUTOENCODER_KL_RULES, "params"
    )  # refuses what could not be read back
    state_dict = {name: tensor.astype(dtype) for name, tensor in state_dict.items()}
    with whole_file(folder / CONFIG_FILE) as config, whole_file(folder / WEIGHTS_FILE) as weights:
        # As bytes: safetensors' own file would be readable by its owner alone.
        weights.write_bytes(safetensors.numpy.save(state_dict, metadata={"format": "pt"}))
        config.write_text(model.config.to_json())


def copy_autoencoder(path_or_id: str | os.PathLike[str], folder: pathlib.Path) -> AutoencoderKLConfig:
    """Copy an autoencoder's two files, byte for byte, into a folder; its config."""
    file = _locate(path_or_id, None)
    config = read_config(file.parent / CONFIG_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    for part in (file.parent / CONFIG_FILE, file):
        paths.copy(part, folder / part.name)
    return config


def weights_hash(path_or_id: str | os.PathLike[str], subfolder: str | None = None) -> str:
    """SHA-256 of the weights' file: which autoencoder made a set of latents."""
    with _locate(path_or_id, subfolder).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def autoencoder_config(path_or_id: str | os.PathLike[str]) -> AutoencoderKLConfig:
    """The sizes and factors of an autoencoder, without its weights; errors as of `load_autoencoder_kl`."""
    return read_config(_locate(path_or_id, None).parent / CONFIG_FILE)


def read_config(file: pathlib.Path) -> AutoencoderKLConfig:
    """The config that a file of diffusers' says; ValueError, naming the file, where the network is another."""
    try:
        return AutoencoderKLConfig.from_json(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def shapes(model: AutoencoderKL) -> dict[str, Any]:
    """The shapes of its parameters."""
    side, channels = model.downsample_factor, model.config.in_channels
    images = jax.ShapeDtypeStruct((1, side, side, channels), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def _new_name(name: str) -> str:
    match = re.fullmatch(r"(.*\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return f"{match[1]}.{_OLD_NAMES[match[2]]}.{match[3]}" if match else name


def read_weights(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a folder's weights, which lie in a safetensors file or, with older ones, in a pickle."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    found = read_tensor_file(file)
    return found.arrays(next(iter(found.sets)))


def weights_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The file of weights in one folder of diffusers' format, None where there is none."""
    files = (folder / name for name in (WEIGHTS_FILE, PICKLED_FILE))
    return next((file for file in files if paths.is_file(file)), None)


def _locate(path_or_id: str | os.PathLike[str], subfolder: str | None) -> pathlib.Path:
    """The file of the weights, which lies beside config.json."""
    name = str(path_or_id)
    root = asset_path("digits_vae") if name == "digits" else paths.to_path(os.path.expanduser(name))
    subfolders = ("", PIPELINE_SUBFOLDER) if subfolder is None else (subfolder,)
    if not paths.is_folder(root):
        root = _download(name, subfolders)
    for sub in subfolders:
        file = weights_file(root / sub)
        if file and paths.is_file(file.parent / CONFIG_FILE):
            return file
    where = " or ".join(str(root / sub) for sub in subfolders)
    raise FileNotFoundError(f"autoencoder {name!r}: expected {CONFIG_FILE} and {WEIGHTS_FILE} in {where}")


def _download(name: str, subfolders: tuple[str, ...]) -> pathlib.Path:
    if not is_hub_id(name):
        raise FileNotFoundError(
            f"autoencoder {name!r} is not a folder; expected a folder, a hub id such as "
            "stabilityai/sd-vae-ft-mse, or 'digits'"
        )
    for weights in (WEIGHTS_FILE, PICKLED_FILE):
        root = from_hub(
            f"autoencoder {name!r}",
            name,
            [f"{sub}/{file}".lstrip("/") for sub in subfolders for file in (CONFIG_FILE, weights)],
        )
        if any((root / sub / weights).is_file() for sub in subfolders):
            break
    return root


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a repository on the hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def from_hub(what: str, name: str, files: list[str]) -> pathlib.Path:
    """The folder with those of the files that a hub's repository has.

    Raises FileNotFoundError, naming `what`, where there is none.
    """
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors and ValueErrors
        reason = re.split(r"\.\s|\n", str(error))[0]  # the rest is advice
        raise FileNotFoundError(
            f"{what} is neither a folder nor a hub repository within reach: {reason}"
        ) from error
