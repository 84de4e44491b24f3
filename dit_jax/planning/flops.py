"""The table of a model's arithmetic, parameters and memory (see `models.cost`).

python -m dit_jax.planning.flops                                     # the paper's family
python -m dit_jax.planning.flops --config configs/digits.py          # one recipe
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from dit_jax.config import (
    DIT_PATCHES,
    DIT_SIZES,
    ComputeConfig,
    Config,
    ConfigError,
    FlowMatchingConfig,
    GaussianConfig,
    MMDiTConfig,
    ModelConfig,
    NetworkConfig,
    TextConfig,
    load,
    resolve,
)
from dit_jax.config.check import SIZES
from dit_jax.config.text import BYTES
from dit_jax.models.cost import (
    activation_bytes_per_image,
    forward_macs,
    parameter_count,
    state_bytes,
    train_flops_per_image,
)


def family() -> list[Config]:
    """The paper's twelve models at 256x256, XL/2 at 512x512, and XL/2 under the other three conditionings."""
    configs = [Config(model=ModelConfig(name=f"DiT-{s}/{p}")) for s in DIT_SIZES for p in DIT_PATCHES]
    configs.append(Config(model=ModelConfig(name="DiT-XL/2", input_size=(64, 64))))
    configs += [
        Config(model=ModelConfig(name="DiT-XL/2", conditioning=c))
        for c in ("in_context", "cross_attention", "adaln")
    ]
    bfloat16 = ComputeConfig(dtype="bfloat16")
    return [resolve(dataclasses.replace(c, compute=bfloat16)) for c in configs]


def table(configs: Sequence[Config], batch_per_device: int, devices: int) -> str:
    """One line per config: parameters, GMACs, GFLOPs, and memory of each of `devices` that share the state."""
    rows = [
        f"{'model':<12}{'latent':>8} {'conditioning':<16}{'params M':>9}{'GMACs':>9}{'GFLOPs':>9}"
        f"{'train GFLOPs':>14}{'state GB':>10}{'activ. GB':>11}"
    ]
    for config in configs:
        m, macs = config.model, forward_macs(config)
        rows.append(
            f"{_label(m):<12}{f'{m.input_size[0]}x{m.input_size[1]}':>8} {m.conditioning:<16}"
            f"{parameter_count(config) / 1e6:>9.1f}{macs / 1e9:>9.2f}{2 * macs / 1e9:>9.2f}"
            f"{train_flops_per_image(config) / 1e9:>14.1f}{state_bytes(config) / devices / 1e9:>10.2f}"
            f"{batch_per_device * activation_bytes_per_image(config) / 1e9:>11.2f}"
        )
    rows.append(
        f"GMACs and GFLOPs: one forward pass per image; train: forward and backward. Memory per device: state is "
        f"float32 parameters, Adam\nand EMA over {devices} device(s); activations are what the forward pass of "
        f"{batch_per_device} images keeps for the backward pass,\nattention fused unless the config says otherwise."
    )
    return "\n".join(rows)


def _label(m: NetworkConfig) -> str:
    unnamed: dict[str, Any] = dict.fromkeys(SIZES)
    as_named = dataclasses.replace(m, **unnamed)
    text = TextConfig(encoder=BYTES if isinstance(m, MMDiTConfig) else "")
    process = FlowMatchingConfig() if isinstance(m, MMDiTConfig) else GaussianConfig()
    named = resolve(Config(model=as_named, text=text, diffusion=process)).model
    same = all(getattr(named, k) == getattr(m, k) for k in SIZES)
    return m.name if same else f"{m.depth}x{m.hidden_size}/{m.patch_size}"


def main(args: Sequence[str] | None = None) -> None:
    """Print the table of one recipe or of the family."""
    parser = argparse.ArgumentParser(description="Parameters, arithmetic and memory of DiT models.")
    parser.add_argument("--config", help="a recipe in configs/ (default: the paper's family)")
    parser.add_argument(
        "--batch-per-device", type=int, default=32, help="images on a device, for activations"
    )
    parser.add_argument("--devices", type=int, default=1, help="devices that share the state (fsdp)")
    options = parser.parse_args(args)
    for option in ("batch_per_device", "devices"):
        if not 1 <= getattr(options, option) < 2**31:
            parser.error(
                f"--{option.replace('_', '-')} is {getattr(options, option)}; expected 1 to {2**31 - 1}"
            )
    try:
        configs = family() if options.config is None else [resolve(load(options.config))]
    except ConfigError as error:
        sys.exit(str(error))
    print(table(configs, options.batch_per_device, options.devices))


if __name__ == "__main__":
    main()
