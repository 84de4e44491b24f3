"""What a config must be before anything is made from it: types, ranges, sizes that divide."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from dit_jax.config.networks import DIT_SIZES, MMDIT_SIZES, MMDiTConfig
from dit_jax.config.saved import from_json, shown, to_json
from dit_jax.config.schema import Config, ConfigError


def model_sizes(name: str) -> tuple[int, int, int, int]:
    """(depth, hidden_size, num_heads, patch_size) of a family member such as "DiT-XL/2"."""
    match = re.fullmatch(r"DiT-(S|B|L|XL)/(\d{1,4})", name)
    if match is None:
        raise ConfigError(
            f"--model.name is {shown(name)}; expected DiT-{{S,B,L,XL}}/{{patch}}, for example DiT-XL/2"
        )
    return (*DIT_SIZES[match[1]], int(match[2]))


SIZES = ("depth", "hidden_size", "num_heads", "patch_size")
HEAD_DIM = 64  # of an MMDiT


def mmdit_sizes(name: str) -> dict[str, Any]:
    """The sizes of an MMDiT by its name, such as "SD3-medium" or "MMDiT-12"."""
    match = re.fullmatch(r"MMDiT-(\d{1,3})", name)
    if match is None and name not in MMDIT_SIZES:
        raise ConfigError(
            f"--model.name is {shown(name)}; expected {', '.join(MMDIT_SIZES)} or MMDiT-{{depth}}, such as MMDiT-12"
        )
    depth, qk_norm, dual_blocks, side = MMDIT_SIZES.get(name) or (int(match[1]) if match else 0, True, 0, 192)
    return {
        "depth": depth, "hidden_size": HEAD_DIM * depth, "num_heads": depth, "patch_size": 2, "qk_norm": qk_norm,
        "dual_blocks": dual_blocks, "positions_side": side,
    }  # fmt: skip


def resolve(config: Config) -> Config:
    """The config with every size filled in from the model's name, checked.

    Raises ConfigError for a wrong type, a value out of range or sizes that do not divide.
    """
    config = typed(config)
    m = config.model
    of_dit = not isinstance(m, MMDiTConfig)
    named = dict(zip(SIZES, model_sizes(m.name), strict=True)) if of_dit else mmdit_sizes(m.name)
    filled: dict[str, Any] = {k: v for k, v in named.items() if getattr(m, k) is None}
    if isinstance(m, MMDiTConfig) and m.hidden_size and m.num_heads is None:
        filled["num_heads"] = max(1, m.hidden_size // HEAD_DIM)
    config = dataclasses.replace(config, model=dataclasses.replace(m, **filled), text=config.text.filled())
    _check_values(config)
    return config


def typed(config: Config) -> Config:
    """The config with values of the declared types that a run can use: text, finite numbers of 32 bits."""
    try:
        text = to_json(config)
    except (TypeError, ValueError) as error:  # a recipe may hold anything
        raise ConfigError(f"the config cannot be written as JSON ({error}); expected plain values") from None
    for option, value in _options(json.loads(text)):
        for part in _flat(value):
            if isinstance(part, str):
                name = part.encode(errors="replace").decode()
                _require(part == name and "\0" not in part, option, shown(part), "text that is UTF-8")
    config = from_json(text)
    for option, value in _options(dataclasses.asdict(config)):
        for part in _flat(value):
            if isinstance(part, int):
                _require(part < 2**31, option, value, f"at most {2**31 - 1}")
            elif isinstance(part, float):
                good = part == 0 or FLOAT32_LEAST <= abs(part) <= FLOAT32_MOST
                _require(good, option, value, "a number that float32 holds")
    return config


def _options(groups: Any) -> Iterator[tuple[str, Any]]:
    """("model.depth", its value) of every option in a config as a dict."""
    for group, options in groups.items():
        if isinstance(options, dict):
            yield from ((f"{group}.{name}", value) for name, value in options.items())


def _flat(value: Any) -> Iterator[Any]:
    """A value, or those of a tuple or list, of which there may be some in each other."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _require(good: bool, option: str, found: object, expected: str) -> None:
    if not good:
        text = found if isinstance(found, str) else shown(found)
        raise ConfigError(f"--{option.replace('_', '-')} is {text}; expected {expected}")


FLOAT32_LEAST, FLOAT32_MOST = 2.0**-126, 3.4e38  # below, hardware counts a number as zero
BELOW_ONE = 1 - 2.0**-24

_POSITIVE = """model.depth model.hidden_size model.num_heads model.patch_size model.in_channels model.mlp_ratio
model.positions_side model.positions_base
optim.learning_rate optim.eps data.local_cache_gb train.batch_size train.steps train.log_every
train.checkpoint_every train.keep train.bad_steps train.sample_count train.sample_steps
train.evaluate_count"""
_SHARES = "model.class_dropout_prob optim.b1 optim.b2 optim.ema_decay"
_NOT_NEGATIVE = """model.num_classes model.dual_blocks optim.warmup_steps optim.weight_decay
optim.grad_clip train.sample_every train.seed train.microbatch train.milestone_every
train.snapshot_every train.max_rollbacks train.stall_minutes train.evaluate_every data.workers
train.local_checkpoint_every"""
_AT_MOST = {  # beyond is a slip of the keyboard, which would end in hours of tracing or in no memory
    "model.depth": 10_000, "model.hidden_size": 2**17, "model.num_heads": 2**17, "model.patch_size": 2**12,
    "model.in_channels": 2**12, "model.mlp_ratio": 1024, "model.num_classes": 2**30,
    "model.positions_side": 2**14, "model.positions_base": 2**14, "data.workers": 1024,
}  # fmt: skip


def profiled_steps(text: str) -> range:
    """The steps that FIRST:LAST names, none for an empty text; ConfigError for what is no such pair."""
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) < 2**31):
        raise ConfigError(
            f"--train.profile-steps is {shown(text)}; expected the first and the last step, such as 20:23"
        )
    return range(int(first), int(last) + 1)


def _there(config: Config, options: Iterable[str]) -> Iterator[str]:
    """Those of the options that the config's kinds have."""
    for option in options:
        group, name = option.split(".")
        if name in {field.name for field in dataclasses.fields(getattr(config, group))}:
            yield option


def _check_values(config: Config) -> None:
    def value(option: str) -> Any:
        group, name = option.split(".")
        return getattr(getattr(config, group), name)

    for option in _there(config, _POSITIVE.split()):
        _require(value(option) > 0, option, value(option), "a number above 0")
    for option in _there(config, _SHARES.split()):
        _require(0 <= value(option) <= BELOW_ONE, option, value(option), "at least 0 and below 1 in float32")
    for option in _there(config, _NOT_NEGATIVE.split()):
        _require(value(option) >= 0, option, value(option), "0 or more")
    for option in _there(config, _AT_MOST):
        most = _AT_MOST[option]
        _require((value(option) or 0) <= most, option, value(option), f"at most {most}")
    _require(config.train.workdir.strip() != "", "train.workdir", "empty", "the folder of the run")
    local = config.train.local_checkpoint_dir
    _require(
        "://" not in local, "train.local_checkpoint_dir", shown(local), "a folder of the host, no bucket"
    )
    for decay in config.optim.ema_more:
        _require(0 <= decay <= BELOW_ONE, "optim.ema_more", decay, "at least 0 and below 1 in float32")
    for width in config.optim.ema_sigma_rel:
        _require(0 < width < 0.28, "optim.ema_sigma_rel", width, "above 0 and below 0.28")
    profiled_steps(config.train.profile_steps)
    _check_mixture(config.data.mixture)
    _check_model(config)
    _check_sizes(config)
    for group in ("diffusion", "text", "lora"):
        for good, option, found, expected in getattr(config, group).rules():
            _require(good, f"{group}.{option}", found, expected)
    most_steps, in_words = config.diffusion.steps_of_a_sampler()
    _require(
        not (config.train.sample_every or config.train.evaluate_every)
        or 2 <= config.train.sample_steps <= most_steps,
        "train.sample_steps", config.train.sample_steps, in_words,
    )  # fmt: skip
    _require(
        config.train.evaluate_every == 0 or config.train.evaluate_count >= 2,
        "train.evaluate_count", config.train.evaluate_count, "at least 2, a distance needs their covariance",
    )  # fmt: skip
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    _require(
        axes.count(-1) <= 1 and all(a is None or a == -1 or a > 0 for a in axes),
        "mesh", f"(data, fsdp, tensor) = {axes}", "sizes above 0, at most one of them -1",
    )  # fmt: skip


def _check_mixture(mixture: tuple[tuple[str, float], ...]) -> None:
    folders = [folder for folder, _ in mixture]
    for folder, weight in mixture:
        _require(folder != "", "data.mixture", "a part without a name", "folders and their weights")
        _require(weight > 0, "data.mixture", f"{folder} {weight}", "weights above 0")
        _require(folders.count(folder) == 1, "data.mixture", f"{folder} twice", "each folder once")


def _check_model(config: Config) -> None:
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
        int(m.hidden_size * m.mlp_ratio) >= 1,
        "model.mlp_ratio", m.mlp_ratio, f"a hidden layer: 1 / {m.hidden_size}, the width, or more",
    )  # fmt: skip
    _require(
        m.num_tokens * m.hidden_size < 2**31,
        "model.input_size", m.input_size, f"fewer than 2^31 numbers: {m.num_tokens} tokens of width {m.hidden_size}",
    )  # fmt: skip
    _require(
        config.compute.norm_kernel == "xla" or m.conditioning in ("adaln", "adaln_zero"),
        "compute.norm_kernel", config.compute.norm_kernel, f"xla, because --model.conditioning is {m.conditioning}",
    )  # fmt: skip
    if isinstance(m, MMDiTConfig):
        _check_mmdit(config, m)


def _check_sizes(config: Config) -> None:
    sizes, model = config.data.sizes, config.model
    _require(not sizes or config.data.mixture != (), "data.sizes", sizes, "none without a --data.mixture")
    _require(
        not sizes or config.data.cache != "device",
        "data.cache", "device", "none or ram with --data.sizes: arrays on a device are of one size",
    )  # fmt: skip
    for size in sizes:
        _require(
            sizes.count(size) == 1 and size != model.input_size,
            "data.sizes", sizes, "each size once, and --model.input-size not among them",
        )  # fmt: skip
        try:
            _check_model(dataclasses.replace(config, model=dataclasses.replace(model, input_size=size)))
        except ConfigError as error:
            raise ConfigError(f"--data.sizes names {size}, which does not serve: {error}") from None


def _check_mmdit(config: Config, m: MMDiTConfig) -> None:
    assert m.patch_size and m.depth and m.positions_side and m.dual_blocks is not None
    _require(
        m.dual_blocks < m.depth, "model.dual_blocks", m.dual_blocks, f"0 to {m.depth - 1}, all but the last"
    )
    _require(
        max(m.input_size) // m.patch_size <= m.positions_side,
        "model.input_size", m.input_size, f"at most --model.positions-side {m.positions_side} patches along a side",
    )  # fmt: skip
    _require(
        config.text.encoder != "", "text.encoder", "empty",
        "bytes, sd3 or a language model: an MMDiT is told captions",
    )  # fmt: skip
    _require(
        not config.diffusion.learn_sigma, "diffusion.learn_sigma", True, "false: an MMDiT predicts no variance"
    )  # fmt: skip
