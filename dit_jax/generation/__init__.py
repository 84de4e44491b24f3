"""From trained weights to pictures."""

from dit_jax.generation.sampling import write_sample_grid

__all__ = ["write_sample_grid"]
