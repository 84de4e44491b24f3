"""How a network is computed, apart from what it computes.

A network is the same function under every `Compute`, up to rounding: its parameters, and so its checkpoints, do not
depend on it. The modules hand one whole value down, and ask it for the kernels.

Letters: T tokens, N tokens of a picture, D width, K channels of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import ConfigError
from dit_jax.models.kernels import derivatives, float8, products, tokens_last

Array = jax.Array
TOKENS_LAST = ("tokens_last", "tokens_last_by_head")
CHOICES = {
    "norm_kernel": ("xla", "pallas"),
    "quantization": ("none", "fp8"),
    "remat": ("none", "full", "dots", "dots_attention"),
}


@dataclass(frozen=True)
class Compute:
    """How a network is computed.

    Attributes:
      dtype: precision of computation; parameters, norms' statistics, softmax and the conditioning vector are float32.
      attention: its kernel; "auto" is what `resolve_attention` says.
      norm_kernel: "pallas" computes residual, gate, norm and modulation of a block in one kernel (see `fused_norm`).
      quantization: "fp8" computes the blocks' four large products (qkv, proj, fc1, fc2) in 8-bit floats, but with
        attention "tokens_last", which has products of its own, in `dtype`.
      remat: what the backward pass recomputes (see `layers.REMAT_POLICIES`).
      unroll: whether the loop over layers is unrolled.
      batch_sharding: a `jax.sharding.Sharding` of the first axis, which the activations of every block keep (None on
        one device). Without it the compiler may split them along the width instead, as split parameters are.
      fsdp_axis: the axis of the mesh that splits both batch and parameters where no other splits parameters (preset
        fsdp); None elsewhere.
      plain: no kernel and no derivative written by hand, so that jax can differentiate in forward mode as well.
    """

    dtype: Any = jnp.float32
    attention: str = "auto"
    norm_kernel: str = "xla"
    quantization: str = "none"
    remat: str = "none"
    unroll: bool = False
    batch_sharding: Any = None
    fsdp_axis: str | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"--compute.{name.replace('_', '-')} is {getattr(self, name)!r}; expected {' or '.join(choices)}"
                )

    def plainly(self) -> Compute:
        """The same without kernels and derivatives written by hand."""
        return dataclasses.replace(
            self, attention="einsum", norm_kernel="xla", quantization="none", plain=True
        )

    def resolved(self, num_tokens: int, head_dim: int, device: Any = None) -> Compute:
        """With the attention that "auto" stands for."""
        kernel = resolve_attention(self.attention, self.dtype, num_tokens, head_dim, device)
        return dataclasses.replace(self, attention=kernel)

    def on(self, device: Any, num_tokens: int, head_dim: int) -> Compute:
        """With kernels that `device` has: not every machine is the one that trained. Plain stays plain."""
        if self.plain:
            return self
        gpu = device.platform in ("gpu", "cuda")
        served = dataclasses.replace(
            self,
            attention="auto" if self.attention == "cudnn" else self.attention,
            norm_kernel=self.norm_kernel if gpu else "xla",
        )
        return served.resolved(num_tokens, head_dim, device)

    # ------------------------------------------------------------------------------------------- devices

    def split_batch(self, tree: Any) -> Any:
        """Arrays with their first axis split as `batch_sharding` says, forward and backward."""
        if self.batch_sharding is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.batch_sharding)

    def for_modulation(self, x: Array, last: str | None) -> Array:
        """x (B, ..., D) as adaLN's product takes and leaves it: each device has the rows of all who share its kernel,
        and of the last axis what `last` splits."""
        if self.fsdp_axis is None:
            return x
        rows = tuple(axis for axis in self.batch_sharding.spec[0] if axis != self.fsdp_axis)
        spec = PartitionSpec(rows, *[None] * (x.ndim - 2), last)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.batch_sharding.mesh, spec))

    @property
    def first_axis_shared(self) -> NamedSharding | None:
        """An array's first axis split over the devices that share the parameters; None without `fsdp_axis`."""
        if self.fsdp_axis is None:
            return None
        return NamedSharding(self.batch_sharding.mesh, PartitionSpec(self.fsdp_axis))

    @property
    def splits_inner_axes(self) -> bool:
        """Whether the mesh also splits inner axes of the parameters (heads, say, over "tensor")."""
        mesh = getattr(self.batch_sharding, "mesh", None)
        return mesh is not None and mesh.shape.get("tensor", 1) > 1

    # ------------------------------------------------------------------------------------------- kernels

    def product(
        self, x: Array, kernel: Array, equation: str, result: Any = None, precision: Any = None
    ) -> Array:
        """einsum(equation, x, kernel), multiplied in x's type (see `products.product`)."""
        if not self.plain:
            return products.product(x, kernel, equation, result, precision)
        result, kernel = jnp.dtype(result or x.dtype), kernel.astype(x.dtype)
        if result != x.dtype:  # XLA's CPU compiler refuses some products of bfloat16 with float32 sums
            x, kernel = x.astype(result), kernel.astype(result)
        return jnp.einsum(equation, x, kernel, precision=precision, preferred_element_type=result)

    def quantized_product(self, tokens: Array, kernel: Array, in_axes: int) -> Array | None:
        """tokens (T, *inputs) times kernel (*inputs, *features) in 8-bit floats; None if they are not asked for."""
        return float8.dot(tokens, kernel, in_axes) if self.quantization == "fp8" else None

    def add_bias(self, x: Array, bias: Array, missing: Sequence[int], by_product: bool = False) -> Array:
        """x + bias in x's type; bias float32, without x's axes `missing` (see `products.add_bias`)."""
        if self.plain:
            return x + jnp.expand_dims(bias.astype(x.dtype), missing)
        return products.add_bias(x, bias, missing, by_product)

    def gelu(self, x: Array) -> Array:
        """GELU in its tanh approximation (arXiv 1606.08415)."""
        return jax.nn.gelu(x, approximate=True) if self.plain else derivatives.gelu(x)


# Narrower layers are compiled longer than the faster steps save (docs/performance.md, "CPU").
UNROLLED_WIDTH = 256


def unrolls(unroll: bool | str, width: int, mesh: Mesh) -> bool:
    """Whether the loop over layers is unrolled: "auto" does it on a single CPU device, where they are wide."""
    if unroll != "auto":
        return bool(unroll)
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu" and width >= UNROLLED_WIDTH


def resolve_attention(kernel: str, dtype: Any, num_tokens: int, head_dim: int, device: Any = None) -> str:
    """The kernel that "auto" stands for on `device`, by default the first of the default backend: cudnn on a GPU in
    bfloat16 (where it takes heads of `head_dim` channels), tokens_last on a TPU (by head where the tokens are many),
    else einsum."""
    if kernel != "auto":
        return kernel
    device = device or jax.devices()[0]
    if device.platform in ("gpu", "cuda") and cudnn_serves(dtype, head_dim):
        return "cudnn"
    if device.platform == "tpu":
        long = num_tokens > tokens_last.all_heads_up_to(device.device_kind)
        return "tokens_last_by_head" if long else "tokens_last"
    return "einsum"


def cudnn_serves(dtype: Any, head_dim: int) -> bool:
    """Whether cuDNN's attention takes heads of this type and number of channels, on every GPU that has it."""
    return jnp.dtype(dtype) == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128
