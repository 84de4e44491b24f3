"""Arithmetic, parameters and memory of a model, and the peak rates of devices.

    python -m dit_jax.flops                                     # the paper's family
    python -m dit_jax.flops --config configs/digits.py          # one recipe

The DiT paper's "Gflops" are multiply-accumulates (MACs) of one forward pass; FLOPs are twice that, and a
training step costs three forward passes. Counted are all matrix products, and one MAC per element for each
block's modulation (scale and shift): the convention under which the paper's figures come out.

Letters: N tokens, D width, L layers, M hidden width of the MLP, P patch side, C latent channels.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from dit_jax.config import DIT_PATCHES, DIT_SIZES, Config, ConfigError, ModelConfig, load, resolve
from dit_jax.models.blocks import MODULATIONS

# Dense bfloat16 peak per device, in FLOP/s, by a part of jax's device_kind in lower case (datasheets; the
# first match counts). A TPU v7x chip shows as two devices.
PEAK_FLOPS = (
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h200 nvl", 835e12),
    ("h100", 989e12),
    ("h200", 989e12),  # and GH200
    ("gb200", 2500e12),
    ("gb300", 2500e12),
    ("b200", 2250e12),
    ("b300", 2250e12),
    ("a100", 312e12),
    ("l40s", 362e12),
    ("tpu v4", 275e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5", 459e12),
    ("tpu v6", 918e12),
    ("tpu7x", 1153e12),
)

# Activations that a block keeps for the backward pass, in units of (tokens x width), MLP ratio 4, with fused
# attention: everything; matmul outputs and block input; attention's output as well; the block input alone.
_SAVED = {"none": 18, "dots": 10, "dots_attention": 11, "full": 1}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, by jax's `device.device_kind`; None where it is not known."""
    kind = device_kind.lower()
    return next((peak for part, peak in PEAK_FLOPS if part in kind), None)


def forward_macs(config: Config) -> int:
    """MACs of one forward pass on one latent, for a resolved config."""
    m = config.model
    assert m.patch_size and m.hidden_size and m.depth
    n, d, hidden = m.num_tokens, m.hidden_size, int(m.hidden_size * m.mlp_ratio)
    conditions = 2 if m.num_classes > 0 else 1
    t = n + (conditions if m.conditioning == "in_context" else 0)
    block = t * (4 * d * d + 2 * d * hidden) + 2 * t * t * d
    if m.conditioning == "cross_attention":
        block += 2 * n * d * d + 2 * conditions * d * d + 2 * n * conditions * d
    vectors = MODULATIONS[m.conditioning]
    if vectors:
        block += vectors * d * d + 2 * n * d
    patch = m.patch_size**2 * m.in_channels
    out = patch * (2 if config.diffusion.learn_sigma else 1)
    ends = n * d * (patch + out) + (256 * d + d * d) + (2 * d * d if vectors else 0)
    return m.depth * block + ends


def train_flops_per_image(config: Config) -> int:
    """FLOPs of forward and backward on one latent: three forward passes of two FLOPs per MAC."""
    return 6 * forward_macs(config)


def parameter_count(config: Config) -> int:
    """Number of trained parameters (the frozen position table is not one)."""
    import jax
    import jax.numpy as jnp

    from dit_jax.models.dit import build_model

    m = config.model
    x = jnp.zeros((1, *m.input_size, m.in_channels))
    t = jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(build_model(config).init, jax.random.key(0), x, t, t)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def activation_bytes_per_image(config: Config) -> int:
    """Estimate of the activations kept for the backward pass, per image, with fused attention.

    Without it (attention "einsum") the float32 logits and their softmax come on top.
    """
    m = config.model
    assert m.hidden_size and m.depth and m.num_heads
    n, width = m.num_tokens, 2 if m.dtype == "bfloat16" else 4
    kept = m.depth * _SAVED[m.remat] * n * m.hidden_size * width
    if m.attention == "einsum" and m.remat == "none":
        kept += m.depth * m.num_heads * n * n * (4 + width)
    return kept


def state_bytes(config: Config) -> int:
    """Bytes of the training state in float32: parameters, Adam's two moments and one EMA."""
    return 16 * parameter_count(config)


def family() -> list[Config]:
    """The paper's twelve models at 256x256, XL/2 at 512x512, and XL/2 under the other three conditionings."""
    configs = [Config(model=ModelConfig(name=f"DiT-{s}/{p}")) for s in DIT_SIZES for p in DIT_PATCHES]
    configs.append(Config(model=ModelConfig(name="DiT-XL/2", input_size=(64, 64))))
    configs += [
        Config(model=ModelConfig(name="DiT-XL/2", conditioning=c))
        for c in ("in_context", "cross_attention", "adaln")
    ]
    bfloat16 = [dataclasses.replace(c, model=dataclasses.replace(c.model, dtype="bfloat16")) for c in configs]
    return [resolve(c) for c in bfloat16]


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
        f"float32 parameters, Adam\nand EMA over {devices} device(s); activations are an estimate for "
        f"{batch_per_device} images, remat as in the config."
    )
    return "\n".join(rows)


def _label(m: ModelConfig) -> str:
    named = resolve(Config(model=ModelConfig(name=m.name, input_size=m.input_size))).model
    same = all(
        getattr(named, k) == getattr(m, k) for k in ("depth", "hidden_size", "num_heads", "patch_size")
    )
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
