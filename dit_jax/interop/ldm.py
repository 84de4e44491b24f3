"""The autoencoder of latent diffusion's own code (CompVis), whose files become folders in diffusers' format.

Its tensors are those of `AutoencoderKL` under other names: attention's linear layers are 1x1 convolutions, and the
decoder's resolutions are counted from the finest. A whole model's file has them under `first_stage_model.`.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

from dit_jax.config import ConfigError
from dit_jax.interop import diffusers, keymap
from dit_jax.interop.keymap import CONV, Layout, Rule
from dit_jax.interop.tensor_files import TensorFile, Tensors
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

PREFIXES = ("", "first_stage_model.")
SIGN = "decoder.up.0.block.0.conv1.weight"
PARTS = (
    r"(encoder|decoder|quant_conv|post_quant_conv)\..*"  # the rest is of training: discriminator, averages
)
SD_SCALING = 0.18215

# (out, in, 1, 1) <-> (in, out)
POINTWISE = Layout(lambda x, shape: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])


def rules(resolutions: int) -> tuple[Rule, ...]:
    """Latent diffusion's names of an autoencoder's parameters."""
    part, mid = "(encoder|decoder)", "(encoder|decoder)/mid_block"
    table = [
        *_conv(r"(quant_conv|post_quant_conv)", r"\1"),
        *_conv(f"{part}/(conv_in|conv_out)", r"\1.\2"),
        *_norm(f"{part}/conv_norm_out", r"\1.norm_out"),
        *_norm(f"{mid}/attentions_0/group_norm", r"\1.mid.attn_1.norm"),
        *_conv(f"{mid}/attentions_0/to_([qkv])", r"\1.mid.attn_1.\2", POINTWISE),
        *_conv(f"{mid}/attentions_0/to_out", r"\1.mid.attn_1.proj_out", POINTWISE),
    ]
    places = [(f"{mid}/resnets_{i}", rf"\1.mid.block_{i + 1}") for i in range(2)]
    for i in range(resolutions):
        for ours, theirs in (
            (f"(encoder)/down_blocks_{i}", rf"\1.down.{i}"),
            (f"(decoder)/up_blocks_{i}", rf"\1.up.{resolutions - 1 - i}"),
        ):
            table += _conv(f"{ours}_(downsample|upsample)", rf"{theirs}.\2.conv")
            places.append((rf"{ours}_resnets_(\d+)", rf"{theirs}.block.\2"))
    for ours, theirs in places:
        last = theirs.count("\\") + 1  # the group after those of the place
        table += _norm(rf"{ours}/(norm\d)", rf"{theirs}.\{last}")
        table += _conv(rf"{ours}/(conv\d)", rf"{theirs}.\{last}")
        table += _conv(f"{ours}/conv_shortcut", f"{theirs}.nin_shortcut")
    return tuple(table)


def _conv(pattern: str, name: str, layout: Layout = CONV) -> tuple[Rule, Rule]:
    return Rule(f"{pattern}/kernel", f"{name}.weight", layout), Rule(f"{pattern}/bias", f"{name}.bias")


def _norm(pattern: str, name: str) -> tuple[Rule, Rule]:
    return Rule(f"{pattern}/scale", f"{name}.weight"), Rule(f"{pattern}/bias", f"{name}.bias")


def holds_autoencoder(found: TensorFile) -> bool:
    """Whether a file is of such an autoencoder."""
    return any(prefix + SIGN in found.sets.get("", ()) for prefix in PREFIXES)


def convert_autoencoder(
    file: pathlib.Path, found: TensorFile, folder: pathlib.Path, scaling_factor: float | None
) -> AutoencoderKLConfig:
    """Write a file's autoencoder as a diffusers folder; its config.

    scaling_factor: None for the one in the file, or else Stable Diffusion's. Raises ConfigError, naming the file and
    listing the tensors, where it is of another architecture.
    """
    tensors = found.arrays("")
    stored = tensors.get("scale_factor")
    prefix = next(prefix for prefix in PREFIXES if prefix + SIGN in tensors)
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and re.fullmatch(PARTS, name.removeprefix(prefix))
    }
    if scaling_factor is None:
        scaling_factor = SD_SCALING if stored is None else float(f"{stored.item():.6g}")
    config = config_of(tensors, scaling_factor, str(file))
    model = AutoencoderKL(config)
    try:
        params: Any = keymap.to_flax(
            tensors, diffusers.shapes(model), rules(len(config.block_out_channels)), str(file)
        )
    except keymap.MismatchError as error:
        raise ConfigError(str(error)) from None
    diffusers.save_autoencoder_kl(folder, model, params)
    return config


def config_of(tensors: Tensors, scaling_factor: float, where: str) -> AutoencoderKLConfig:
    """The sizes that the tensors' shapes tell; ConfigError, naming the file, where they tell none."""

    def numbers(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    def size(name: str, axis: int) -> int:
        tensor = tensors.get(f"{name}.weight")
        if tensor is None or tensor.ndim != 4:
            raise ConfigError(
                f"{where} has no convolution {name}; expected an autoencoder of latent diffusion"
            )
        return int(tensor.shape[axis])

    resolutions = numbers(r"encoder\.down\.(\d+)\.")
    try:
        return AutoencoderKLConfig(
            in_channels=size("encoder.conv_in", 1),
            out_channels=size("decoder.conv_out", 0),
            block_out_channels=tuple(size(f"encoder.down.{i}.block.0.conv1", 0) for i in range(resolutions)),
            layers_per_block=numbers(r"encoder\.down\.0\.block\.(\d+)\."),
            latent_channels=size("decoder.conv_in", 1),
            scaling_factor=scaling_factor,
            use_quant_conv="quant_conv.weight" in tensors,
            use_post_quant_conv="post_quant_conv.weight" in tensors,
            mid_block_add_attention="encoder.mid.attn_1.q.weight" in tensors,
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where} cannot be used: {error}") from None
