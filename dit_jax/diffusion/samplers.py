"""The samplers of the Gaussian process by their first address; they live in `dit_jax.samplers`."""

from dit_jax.samplers.ancestral import ddpm_step, sample_ddpm
from dit_jax.samplers.ddim import ddim_step, ddim_tables, sample_ddim
from dit_jax.samplers.noise import sample_keys, start_noise, step_noise_at

__all__ = [
    "ddim_step",
    "ddim_tables",
    "ddpm_step",
    "sample_ddim",
    "sample_ddpm",
    "sample_keys",
    "start_noise",
    "step_noise_at",
]
