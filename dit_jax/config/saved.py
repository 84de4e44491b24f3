"""A config as JSON, as runs and checkpoints keep it."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from dit_jax.config.lora import LoraConfig
from dit_jax.config.networks import MODEL_KINDS, DiTConfig, MMDiTConfig
from dit_jax.config.processes import PROCESS_KINDS, FlowMatchingConfig, GaussianConfig
from dit_jax.config.schema import (
    ComputeConfig,
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
)
from dit_jax.config.text import TextConfig
from dit_jax.config.upgrade import VERSION, upgraded

KINDS = {"model": MODEL_KINDS, "diffusion": PROCESS_KINDS}


UNSAID = ("mixture", "sizes", "local_cache", "local_cache_gb")
"""Options of the data that are left out at their defaults: a run without them is written as before there were any."""


def to_json(config: Config) -> str:
    """The config as indented JSON; `from_json` reads it back to an equal config."""
    groups, usual = dataclasses.asdict(config), dataclasses.asdict(DataConfig())
    for name in UNSAID:
        if groups["data"][name] == usual[name]:
            del groups["data"][name]
    return json.dumps({"version": VERSION, **groups}, indent=2) + "\n"


def from_json(text: str) -> Config:
    """A config from its JSON, also from that of earlier versions.

    Unknown keys, wrong types and numbers that are not finite raise ConfigError.
    """
    import pydantic

    try:
        saved = json.loads(text)
    except (ValueError, RecursionError):
        saved = None  # pydantic says what is wrong with it
    if isinstance(saved, dict):
        text = json.dumps(upgraded(saved))
    try:
        return _reader().validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"]]
        if first["type"].startswith("union_tag"):
            found = shown(first["ctx"]["tag"]) if "tag" in first["ctx"] else "missing"
            raise ConfigError(
                f"--{where[0]}.kind is {found}; expected {' or '.join(KINDS[where[0]])}"
            ) from None
        if where[1:2] and where[1] in KINDS.get(where[0], ()):
            del where[1]  # which member of the union
        option = ".".join(where)
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise ConfigError(
                f"unknown option {shown(option)}; expected one that train --help lists"
            ) from None
        name = f"--{option.replace('_', '-')}" if option else "the config"
        raise ConfigError(f"{name} is {shown(first.get('input'))}; {first['msg'].lower()}") from None


@functools.cache
def _reader() -> Any:
    """pydantic's reader of a `Config`."""
    import pydantic

    strict = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    kinds = (DiTConfig, MMDiTConfig, GaussianConfig, FlowMatchingConfig)
    groups = (TextConfig, LoraConfig, ComputeConfig, DataConfig, OptimConfig, MeshConfig, TrainConfig)
    for cls in (*kinds, *groups, Config):
        setattr(cls, "__pydantic_config__", strict)  # noqa: B010  (pydantic reads it; no class declares it)
    return pydantic.TypeAdapter(Config)


def shown(value: object, length: int = 80) -> str:
    """A value as Python writes it, cut where it would hide the sentence that it stands in."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= length else f"{text[:length]}..."
