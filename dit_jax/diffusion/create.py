"""From the configuration to a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dit_jax.config import FlowMatchingConfig, GaussianConfig
from dit_jax.diffusion.flow import FlowMatching
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.process import Process
from dit_jax.diffusion.times import TimeDistribution


def create_process(config: GaussianConfig | FlowMatchingConfig, respacing: str = "") -> Process:
    """The process of a run's configuration; `respacing` thins the steps of a process that has such."""
    return BUILDERS[config.kind](config, respacing)


def _gaussian(config: GaussianConfig, respacing: str) -> GaussianDiffusion:
    return GaussianDiffusion.create(
        respacing=respacing,
        schedule=config.schedule,
        learn_sigma=config.learn_sigma,
        loss=config.loss,
        num_timesteps=config.num_timesteps,
        prediction=config.prediction,
        sigma=config.sigma,
    )


def _flow(config: FlowMatchingConfig, respacing: str) -> FlowMatching:
    if respacing:
        raise ValueError(
            f"respacing is {respacing!r}; expected none, flow matching has no table of timesteps"
        )
    margins = {"train_eps": config.train_eps, "sample_eps": config.sample_eps}
    return FlowMatching.create(
        config.path,
        config.prediction,
        None if config.loss_weight == "none" else config.loss_weight,
        cosine_weight=config.cosine_weight,
        time_scale=config.time_scale,
        time_direction=config.time_direction,
        times=TimeDistribution(
            config.times, config.logit_mean, config.logit_std, config.mode_scale, config.shift
        ),
        **{name: margin for name, margin in margins.items() if margin is not None},
    )


# A new kind of process is its config in dit_jax.config.processes, and its row here.
BUILDERS: dict[str, Callable[[Any, str], Process]] = {"gaussian": _gaussian, "flow": _flow}
