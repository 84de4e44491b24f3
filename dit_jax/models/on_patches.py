"""What networks on the patches of a latent have in common, whatever their blocks."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Self

from dit_jax.models.compute import Compute


class OnPatches:
    """For a Flax module with `input_size`, a latent's side or (H, W), `patch_size`, and `compute`."""

    if TYPE_CHECKING:
        input_size: int | tuple[int, int]
        patch_size: int
        compute: Compute
        clone: Any

    def computed(self, **options: Any) -> Self:
        """The same network, computed with these options of `Compute`."""
        return self.clone(compute=dataclasses.replace(self.compute, **options))

    def plain(self) -> Self:
        """The same network without kernels and derivatives written by hand.

        It is what kernels are compared with, and has forward-mode derivatives (`jax.jvp`).
        """
        return self.clone(compute=self.compute.plainly())

    @property
    def latent_size(self) -> tuple[int, int]:
        """(H, W) of the latent."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        h, w = self.latent_size
        return h // self.patch_size, w // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Patches of a latent."""
        return math.prod(self.grid_size)
