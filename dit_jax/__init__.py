"""Diffusion Transformers in JAX: train on precomputed VAE latents, sample in one jitted loop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_jax.diffusion.gaussian import GaussianDiffusion
    from dit_jax.diffusion.samplers import sample_ddim, sample_ddpm
    from dit_jax.models.dit import DiT

__all__ = ["DiT", "GaussianDiffusion", "sample_ddim", "sample_ddpm"]

_HOME = {
    "DiT": "dit_jax.models.dit",
    "GaussianDiffusion": "dit_jax.diffusion.gaussian",
    "sample_ddim": "dit_jax.diffusion.samplers",
    "sample_ddpm": "dit_jax.diffusion.samplers",
}


def __getattr__(name: str) -> Any:
    """The public names, imported at first use so that `import dit_jax` is quick."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dit_jax' has no attribute {name!r}")
