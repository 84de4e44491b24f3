"""The options of each kind of network. `kind` tells them apart, in a recipe's class and in a saved config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from dit_jax.config.processes import ByKind

Conditioning = Literal["in_context", "cross_attention", "adaln", "adaln_zero"]
Convention = Literal["published", "diffusers"]

# DiT paper (arXiv 2212.09748), Table 1: layers, width, heads.
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DIT_PATCHES = (8, 4, 2)

# Published networks of Stable Diffusion 3: layers, norms of queries and keys, blocks with a second attention, side of
# the table of positions. Heads are of 64 channels, as many as layers.
MMDIT_SIZES = {
    "SD3-medium": (24, False, 0, 192),
    "SD3.5-medium": (24, True, 13, 384),
    "SD3.5-large": (38, True, 0, 192),
}


class _OnPatches:
    """What is derived of the sizes of a resolved config."""

    hidden_size: int | None
    num_heads: int | None
    patch_size: int | None
    input_size: tuple[int, int]

    @property
    def head_dim(self) -> int:
        """Channels of an attention head, of a resolved config."""
        assert self.hidden_size and self.num_heads
        return self.hidden_size // self.num_heads

    @property
    def num_tokens(self) -> int:
        """Patches of a latent, of a resolved config."""
        assert self.patch_size
        return (self.input_size[0] // self.patch_size) * (self.input_size[1] // self.patch_size)


@dataclass(frozen=True)
class DiTConfig(_OnPatches):
    """The network. `name` sets four sizes; an explicit size overrides it."""

    name: str = "DiT-XL/2"
    """Family member, DiT-{S,B,L,XL}/{patch}: sets depth, hidden_size, num_heads and patch_size."""
    depth: int | None = None
    """Number of transformer blocks (None: as the name says)."""
    hidden_size: int | None = None
    """Width D of the tokens (None: as the name says)."""
    num_heads: int | None = None
    """Attention heads (None: as the name says)."""
    patch_size: int | None = None
    """Side of a patch, in latent pixels (None: as the name says)."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer over hidden_size."""
    conditioning: Conditioning = "adaln_zero"
    """How timestep and label enter the blocks (paper, section 3.2)."""
    input_size: tuple[int, int] = (32, 32)
    """Height and width of the latent."""
    in_channels: int = 4
    """Channels of the latent."""
    num_classes: int = 1000
    """Number of classes; 0 for an unconditional model."""
    class_dropout_prob: float = 0.1
    """Share of training labels replaced by the null label, for classifier-free guidance."""
    convention: Convention = "published"
    """Whose numbers the network computes with the same weights: the published code's, or those of diffusers, which
    divides the logarithms of a timestep's frequencies by 127 instead of 128 and adds 1e-5 instead of 1e-6 to the
    variance in a block's second norm."""
    kind: Literal["dit"] = "dit"
    """The kind of network, which the recipe chooses."""


@dataclass(frozen=True)
class MMDiTConfig(_OnPatches):
    """Stable Diffusion 3's network. `name` sets its sizes; an explicit size overrides it."""

    name: str = "SD3-medium"
    """SD3-medium, SD3.5-medium, SD3.5-large, or MMDiT-{depth}: so many layers and heads of 64 channels, as in the
    paper's study (arXiv 2403.03206, section 5.3), with queries and keys normed."""
    depth: int | None = None
    """Number of transformer blocks (None: as the name says)."""
    hidden_size: int | None = None
    """Width D of the tokens (None: as the name says)."""
    num_heads: int | None = None
    """Attention heads (None: as the name says)."""
    patch_size: int | None = None
    """Side of a patch, in latent pixels (None: 2)."""
    mlp_ratio: float = 4.0
    """Width of the MLPs' hidden layers over hidden_size."""
    qk_norm: bool | None = None
    """Whether every head's queries and keys are normed (None: as the name says)."""
    dual_blocks: int | None = None
    """Blocks, from the first on, in which the picture attends to itself as well (None: as the name says)."""
    positions_side: int | None = None
    """Side of the table from whose middle positions are cut (None: as the name says)."""
    positions_base: int = 64
    """Entries of that table lie positions_base / positions_side apart: patches along a picture of the size in which
    the network was first trained."""
    input_size: tuple[int, int] = (64, 64)
    """Height and width of the latent."""
    in_channels: int = 16
    """Channels of the latent."""
    kind: Literal["mmdit"] = "mmdit"
    """The kind of network, which the recipe chooses."""

    @property
    def conditioning(self) -> Conditioning:
        """How time and pooled text enter the blocks."""
        return "adaln_zero"

    @property
    def convention(self) -> Convention:
        """Published code and diffusers compute the same."""
        return "published"

    @property
    def num_classes(self) -> int:
        """It knows captions alone."""
        return 0

    @property
    def class_dropout_prob(self) -> float:
        """It knows captions alone."""
        return 0.0


ModelConfig = DiTConfig
"""The name of the one kind that there was."""

MODEL_KINDS = ("dit", "mmdit")
NetworkConfig = Annotated[DiTConfig | MMDiTConfig, ByKind()]
