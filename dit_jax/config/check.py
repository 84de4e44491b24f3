"""What a config must be before anything is made from it: types, ranges, sizes that divide."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from dit_jax.config.saved import from_json, to_json
from dit_jax.config.schema import DIT_SIZES, Config, ConfigError


def model_sizes(name: str) -> tuple[int, int, int, int]:
    """(depth, hidden_size, num_heads, patch_size) of a family member such as "DiT-XL/2"."""
    match = re.fullmatch(r"DiT-(S|B|L|XL)/(\d+)", name)
    if match is None:
        raise ConfigError(
            f"--model.name is {name!r}; expected DiT-{{S,B,L,XL}}/{{patch}}, for example DiT-XL/2"
        )
    return (*DIT_SIZES[match[1]], int(match[2]))


def resolve(config: Config) -> Config:
    """The config with every size filled in from the model's name, checked.

    Raises ConfigError for a wrong type, a value out of range or sizes that do not divide.
    """
    from_json(to_json(config))  # a recipe's values have the declared types
    m = config.model
    named = dict(zip(("depth", "hidden_size", "num_heads", "patch_size"), model_sizes(m.name), strict=True))
    filled: dict[str, Any] = {k: v for k, v in named.items() if getattr(m, k) is None}
    config = dataclasses.replace(config, model=dataclasses.replace(m, **filled))
    _check_values(config)
    return config


def _require(good: bool, option: str, found: object, expected: str) -> None:
    if not good:
        raise ConfigError(f"--{option.replace('_', '-')} is {found}; expected {expected}")


_POSITIVE = """model.depth model.hidden_size model.num_heads model.patch_size model.in_channels model.mlp_ratio
diffusion.num_timesteps optim.learning_rate optim.eps train.batch_size train.steps train.log_every
train.checkpoint_every train.keep train.bad_steps train.sample_count train.sample_steps"""
_SHARES = "model.class_dropout_prob optim.b1 optim.b2 optim.ema_decay"
_NOT_NEGATIVE = """model.num_classes optim.warmup_steps optim.weight_decay optim.grad_clip train.sample_every
train.seed train.microbatch train.milestone_every train.snapshot_every train.max_rollbacks data.workers"""


def _check_values(config: Config) -> None:
    def value(option: str) -> Any:
        group, name = option.split(".")
        return getattr(getattr(config, group), name)

    for option in _POSITIVE.split():
        _require(value(option) > 0, option, value(option), "a number above 0")
    for option in _SHARES.split():
        _require(0 <= value(option) < 1, option, value(option), "at least 0 and below 1")
    for option in _NOT_NEGATIVE.split():
        _require(value(option) >= 0, option, value(option), "0 or more")
    for decay in config.optim.ema_more:
        _require(0 <= decay < 1, "optim.ema_more", decay, "at least 0 and below 1")
    for width in config.optim.ema_sigma_rel:
        _require(0 < width < 0.28, "optim.ema_sigma_rel", width, "above 0 and below 0.28")
    m = config.model
    assert m.patch_size and m.hidden_size and m.num_heads  # filled by resolve
    for side in m.input_size:
        _require(
            side > 0 and side % m.patch_size == 0,
            "model.input_size", m.input_size, f"sides divisible by --model.patch-size {m.patch_size}",
        )  # fmt: skip
    _require(
        m.hidden_size % m.num_heads == 0,
        "model.hidden_size", m.hidden_size, f"a multiple of --model.num-heads {m.num_heads}",
    )  # fmt: skip
    _require(
        m.hidden_size % 4 == 0,
        "model.hidden_size",
        m.hidden_size,
        "a multiple of 4 (2D sine-cosine positions)",
    )
    _require(
        m.norm_kernel == "xla" or m.conditioning in ("adaln", "adaln_zero"),
        "model.norm_kernel", m.norm_kernel, f"xla, because --model.conditioning is {m.conditioning}",
    )  # fmt: skip
    least = 21 if config.diffusion.schedule == "linear" else 2  # linear betas reach 1 with fewer
    timesteps = config.diffusion.num_timesteps
    _require(
        timesteps >= least,
        "diffusion.num_timesteps", timesteps,
        f"at least {least} for --diffusion.schedule {config.diffusion.schedule}",
    )  # fmt: skip
    _require(
        config.train.sample_every == 0 or 2 <= config.train.sample_steps <= timesteps,
        "train.sample_steps", config.train.sample_steps, f"2 to {timesteps}, the timesteps of training",
    )  # fmt: skip
    _require(config.train.seed < 2**31, "train.seed", config.train.seed, f"at most {2**31 - 1}")
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    _require(
        axes.count(-1) <= 1 and all(a is None or a == -1 or a > 0 for a in axes),
        "mesh", f"(data, fsdp, tensor) = {axes}", "sizes above 0, at most one of them -1",
    )  # fmt: skip
