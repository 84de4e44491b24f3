"""What networks on the patches of a latent have in common, whatever their blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import jax

from dit_jax.config import LoraConfig
from dit_jax.models.compute import Compute
from dit_jax.models.lora import LORA, merged, with_lora


class OnPatches:
    """For a Flax module with `input_size`, a latent's side or (H, W), `patch_size`, `compute` and `lora`."""

    if TYPE_CHECKING:
        input_size: int | tuple[int, int]
        patch_size: int
        compute: Compute
        lora: LoraConfig
        clone: Any

    def init(self, rngs: Any, *args: Any, **options: Any) -> Any:
        """Fresh variables, with those of low-rank adaptation where `lora` asks for it."""
        variables = super().init(rngs, *args, **options)  # type: ignore[misc]
        if self.lora.rank == 0:
            return variables
        return {"params": with_lora(variables["params"], self.lora, jax.random.fold_in(rngs, 1))}

    def apply(self, variables: Any, *args: Any, **options: Any) -> Any:
        """The network with these variables, moved by those of low-rank adaptation where they are among them."""
        if LORA in variables["params"]:
            variables = {**variables, "params": merged(variables["params"], self.lora)}
        return super().apply(variables, *args, **options)  # type: ignore[misc]

    def computed(self, **options: Any) -> Self:
        """The same network, computed with these options of `Compute`."""
        return self.clone(compute=dataclasses.replace(self.compute, **options))

    def without(self, layers: Sequence[int]) -> Self:
        """The same network, some of whose blocks, counted from 0, leave everything as it is."""
        return self.clone(skip_layers=tuple(sorted(set(layers))))

    def of_size(self, size: tuple[int, int]) -> Self:
        """The same network, with the same parameters, for latents of another height and width."""
        return self if size == self.latent_size else self.clone(input_size=size)

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
