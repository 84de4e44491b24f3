"""A config as JSON, as runs and checkpoints keep it."""

from __future__ import annotations

import dataclasses
import json

from dit_jax.config.schema import (
    Config,
    ConfigError,
    DataConfig,
    DiffusionConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


def to_json(config: Config) -> str:
    """The config as indented JSON; `from_json` reads it back to an equal config."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """A config from its JSON; unknown keys and wrong types raise ConfigError."""
    import pydantic

    strict = pydantic.ConfigDict(extra="forbid", strict=True)
    for cls in (ModelConfig, DiffusionConfig, DataConfig, OptimConfig, MeshConfig, TrainConfig, Config):
        setattr(cls, "__pydantic_config__", strict)  # noqa: B010  (pydantic reads it; no class declares it)
    try:
        return pydantic.TypeAdapter(Config).validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"]) or "config"
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise ConfigError(f"unknown option {option!r}; see python train.py --help") from None
        expected = first["msg"].lower()
        raise ConfigError(f"--{option.replace('_', '-')} is {first.get('input')!r}; {expected}") from None
