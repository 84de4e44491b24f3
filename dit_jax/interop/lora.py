"""Low-rank adaptation of an MMDiT, as the pipelines of Stable Diffusion 3 in diffusers load it.

A .safetensors file with `transformer.MODULE.lora_A.weight` (R, in) and `.lora_B.weight` (out, R) for each of the
transformer's modules; the scale is part of the second, so that every program reads it as 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import traverse_util

from dit_jax import paths
from dit_jax.config import ConfigError, LoraConfig
from dit_jax.config.text import SD3
from dit_jax.interop.sd3 import diffusers_rules
from dit_jax.interop.tensor_files import write_safetensors
from dit_jax.models.mmdit import MMDiT

PREFIX = "transformer."


def lora_state_dict(lora: Any, model: MMDiT, config: LoraConfig) -> dict[str, np.ndarray]:
    """The tensors by their names in diffusers, of what stands under `lora/` in our parameters."""
    rules = [rule for rule in diffusers_rules(model) if rule.pattern.endswith("/kernel")]
    found: dict[str, np.ndarray] = {}
    for path, value in traverse_util.flatten_dict(lora, sep="/").items():
        layer, _, which = path.rpartition("/")
        rule = next(rule for rule in rules if rule.applies(f"{layer}/kernel"))
        for name, part in rule.split(f"{layer}/kernel", np.asarray(value)).items():
            module = PREFIX + name.removesuffix(".weight")
            if which == "down":  # (*inputs, R)
                found[f"{module}.lora_A.weight"] = part.reshape(-1, part.shape[-1]).T
            else:  # (R, *outputs)
                found[f"{module}.lora_B.weight"] = config.scale * part.reshape(part.shape[0], -1).T
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


def write_lora(file: paths.Named, params: Any, model: Any, config: LoraConfig) -> None:
    """Write the file. Raises ConfigError for a network that diffusers loads no such file for."""
    if not isinstance(model, MMDiT) or model.text.encoder != SD3:
        raise ConfigError(
            "--to is lora, but diffusers loads one for an MMDiT with --text.encoder sd3 alone; expected folder"
        )
    write_safetensors(file, lora_state_dict(params, model, config))
