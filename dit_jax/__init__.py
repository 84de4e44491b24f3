"""Diffusion Transformers in JAX: train on precomputed VAE latents, sample in one jitted loop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_jax.diffusion.flow import FlowMatching
    from dit_jax.diffusion.gaussian import GaussianDiffusion
    from dit_jax.models.dit import DiT
    from dit_jax.models.mmdit import MMDiT
    from dit_jax.samplers.ancestral import sample_ddpm
    from dit_jax.samplers.ddim import sample_ddim
    from dit_jax.samplers.ode import sample_ode
    from dit_jax.samplers.sde import sample_sde

__all__ = [
    "DiT",
    "FlowMatching",
    "GaussianDiffusion",
    "MMDiT",
    "sample_ddim",
    "sample_ddpm",
    "sample_ode",
    "sample_sde",
]

_HOME = {
    "DiT": "dit_jax.models.dit",
    "FlowMatching": "dit_jax.diffusion.flow",
    "GaussianDiffusion": "dit_jax.diffusion.gaussian",
    "MMDiT": "dit_jax.models.mmdit",
    "sample_ddim": "dit_jax.samplers.ddim",
    "sample_ddpm": "dit_jax.samplers.ancestral",
    "sample_ode": "dit_jax.samplers.ode",
    "sample_sde": "dit_jax.samplers.sde",
}


def __getattr__(name: str) -> Any:
    """The public names, imported at first use so that `import dit_jax` is quick."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dit_jax' has no attribute {name!r}")
