"""From trained weights to pictures."""

from dit_jax.generation.sampling import check_sample_grids, write_sample_grid

__all__ = ["check_sample_grids", "write_sample_grid"]
