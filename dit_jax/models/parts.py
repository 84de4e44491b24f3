"""What blocks are made of, apart from attention: the published DiT's choices, and the place for others.

A new norm, MLP, table of positions, or treatment of queries and keys is one new part here; blocks stay as they are.

Letters: B batch, N tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dit_jax.config import ConfigError
from dit_jax.models.arithmetic import modulated
from dit_jax.models.attention import QueriesKeys
from dit_jax.models.compute import Compute
from dit_jax.models.embeddings import sincos_positions, timestep_embedding
from dit_jax.models.kernels import derivatives, fused_norm
from dit_jax.models.mlp import Mlp
from dit_jax.models.norms import AffineNorm, add_gated, normalize, shift_and_scale

Array = jax.Array


@dataclass(frozen=True)
class Norm:
    """A norm over the width, in the ways in which blocks use it.

    Attributes:
      normalize: (..., D) -> (..., D) float32, without parameters.
      affine: the module with learned parameters, called with its `dtype`.
      by_hand: (x, shift, scale, dtype) -> modulated norm, with a derivative written by hand, if there is one.
      fused: residual, gate, norm and modulation in one kernel (`fused_norm`), if there is one.
    """

    normalize: Callable[[Array], Array]
    affine: Callable[..., Any]
    by_hand: Callable[..., Array] | None = None
    fused: Callable[..., tuple[Array, Array]] | None = None

    def modulate(self, x: Array, shift: Array, scale: Array, compute: Compute) -> Array:
        """norm(x) * (1 + scale) + shift: x (B, N, D), shift and scale (B, D) -> (B, N, D)."""
        if self.by_hand is not None and not compute.plain:
            return self.by_hand(x, shift, scale, compute.dtype)
        return shift_and_scale(self.normalize(x), shift, scale, compute.dtype)

    def add_and_modulate(
        self, x: Array, branch: Array | None, gate: Array | None, shift: Array, scale: Array, compute: Compute
    ) -> tuple[Array, Array]:
        """x + gate * branch (B, N, D), and its modulated norm; no branch adds nothing, no gate is 1."""
        if compute.norm_kernel == "pallas":
            if self.fused is None:
                raise ConfigError(
                    "--compute.norm-kernel is pallas; expected xla: this norm has no such kernel"
                )
            return self.fused(x, branch, gate, shift, scale, compute.dtype, compute.batch_sharding)
        if branch is not None:
            x = add_gated(x, branch, gate)
        return x, modulated(self.modulate(x, shift, scale, compute))


LAYER_NORM = Norm(normalize, AffineNorm, derivatives.modulate, fused_norm.gate_residual_modulate)
_WIDER: dict[str, Any] = {"epsilon": 1e-5}
DIFFUSERS_SECOND_NORM = Norm(
    functools.partial(normalize, **_WIDER),
    functools.partial(AffineNorm, **_WIDER),
    functools.partial(derivatives.modulate, **_WIDER),
    functools.partial(fused_norm.gate_residual_modulate, **_WIDER),
)


@dataclass(frozen=True)
class Parts:
    """The parts of a network.

    Attributes:
      norm: of every branch, and of the final layer.
      second_norm: of a block's last branch, the MLP (None: `norm`).
      sinusoid: timesteps (B,) -> (B, 256), what their MLP is given.
      mlp: a module (hidden width, compute), (B, N, D) -> (B, N, D).
      positions: (rows, columns, D) -> (rows * columns, D) float32, which are added to the patches; for latents of
        another size than the network's own also given its rows and columns.
      queries_keys: what attention compares instead of queries and keys (see `SelfAttention`); None: those themselves.
    """

    norm: Norm = LAYER_NORM
    second_norm: Norm | None = None
    sinusoid: Callable[[Array], Array] = timestep_embedding
    mlp: Callable[..., Any] = Mlp
    positions: Callable[..., np.ndarray] = sincos_positions
    queries_keys: QueriesKeys | None = None


CONVENTIONS = {
    "published": Parts(),
    "diffusers": Parts(
        second_norm=DIFFUSERS_SECOND_NORM, sinusoid=functools.partial(timestep_embedding, shift=1)
    ),
}
"""The parts by `config.model.convention`."""
