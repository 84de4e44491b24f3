"""From the configuration to a process."""

from __future__ import annotations

from dit_jax.config import DiffusionConfig
from dit_jax.diffusion.gaussian import GaussianDiffusion


def create_process(config: DiffusionConfig, respacing: str = "") -> GaussianDiffusion:
    """The process of a run's configuration; `respacing` thins its steps for sampling."""
    return GaussianDiffusion.create(
        respacing=respacing,
        schedule=config.schedule,
        learn_sigma=config.learn_sigma,
        loss=config.loss,
        num_timesteps=config.num_timesteps,
        prediction=config.prediction,
        sigma=config.sigma,
    )
