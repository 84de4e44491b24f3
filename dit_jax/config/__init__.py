"""The typed configuration of a run: every option (`schema`), what is refused (`check`), where configs come from.

A recipe in configs/ is a Python file that defines `config`, a `Config` that states only what differs from
the defaults in the schema. The command line overrides the recipe:

    python train.py --config configs/dit_xl2_imagenet256.py --train.batch-size 512 --model.depth 12

Every problem is a `ConfigError` whose one sentence names the option, what was found and what is expected.
"""

from dit_jax.config.check import model_sizes, resolve
from dit_jax.config.lora import LoraConfig
from dit_jax.config.networks import MMDIT_SIZES, MMDiTConfig, NetworkConfig
from dit_jax.config.processes import DiffusionConfig, FlowMatchingConfig, GaussianConfig, ProcessConfig
from dit_jax.config.recipe import load, parse_args, run_config
from dit_jax.config.saved import from_json, to_json
from dit_jax.config.schema import (
    DIT_PATCHES,
    DIT_SIZES,
    ComputeConfig,
    Conditioning,
    Config,
    ConfigError,
    DataConfig,
    DiTConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    TrainConfig,
)
from dit_jax.config.text import TextConfig

__all__ = [
    "DIT_PATCHES",
    "DIT_SIZES",
    "MMDIT_SIZES",
    "ComputeConfig",
    "Conditioning",
    "Config",
    "ConfigError",
    "DataConfig",
    "DiTConfig",
    "DiffusionConfig",
    "FlowMatchingConfig",
    "GaussianConfig",
    "LoraConfig",
    "MMDiTConfig",
    "MeshConfig",
    "ModelConfig",
    "NetworkConfig",
    "OptimConfig",
    "Precision",
    "ProcessConfig",
    "TextConfig",
    "TrainConfig",
    "from_json",
    "load",
    "model_sizes",
    "parse_args",
    "resolve",
    "run_config",
    "to_json",
]
