"""The options of low-rank adaptation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dit_jax.config.processes import Rule


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685): train thin matrices beside the products of attention and MLP, and
    nothing else. For --train.init-from."""

    rank: int = 0
    """Rank of the matrices (0: train the whole network)."""
    alpha: float | None = None
    """Their product is added times alpha / rank (None: times 1)."""

    @property
    def scale(self) -> float:
        """What their product is multiplied by."""
        return 1.0 if self.alpha is None or self.rank == 0 else self.alpha / self.rank

    def rules(self) -> Iterator[Rule]:
        """What the options must be."""
        yield 0 <= self.rank <= 2**16, "rank", self.rank, f"0 to {2**16}"
        yield self.alpha is None or self.alpha > 0, "alpha", self.alpha, "a number above 0"
