"""The linear layer that all parts share."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dit_jax.models.compute import Compute
from dit_jax.models.initializers import Initializer, xavier_uniform_fused
from dit_jax.models.kernels.tokens_last import added_by_heads

Array = jax.Array


class Linear(nn.Module):
    """A linear layer from the last axes of x to `features`, computed on flattened tokens.

    Tokens are flattened to one axis before the product, so that the weight's gradient contracts a single
    axis: backends make a plain matrix product of it. The kernel is stored with its axes apart, for sharding.
    quantized: in the format that `compute.quantization` names, if any; equations stay in `compute.dtype`.
    result: the type of the result (None: `compute.dtype`), for a product that is not to be rounded to it.
    precision: of a product in float32 (None: jax's default, less than float32 on accelerators).
    bias_by_product: with an equation, how the bias's gradient is summed (see `products.add_bias`).
    """

    features: tuple[int, ...]
    in_axes: int = 1
    kernel_init: Initializer | None = None
    compute: Compute = Compute()
    quantized: bool = False
    result: Any = None
    precision: Any = None
    bias_by_product: bool = False

    @nn.compact
    def __call__(self, x: Array, equation: str = "") -> Array:
        """x (..., *inputs) -> (..., *features); with an equation, x and the result are as it says."""
        operands, _, of_out = equation.partition("->")
        of_x, _, of_kernel = operands.partition(",")
        sizes = dict(zip(of_x, x.shape, strict=False))
        inputs = tuple(sizes[i] for i in of_kernel[: self.in_axes]) or x.shape[x.ndim - self.in_axes :]
        init = self.kernel_init or xavier_uniform_fused(self.in_axes)
        kernel = self.param("kernel", init, (*inputs, *self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
        x = x.astype(self.compute.dtype)
        if equation:
            outputs = of_kernel[self.in_axes :]
            if self.in_axes == 2:  # heads and their channels
                kernel = added_by_heads(kernel, -1, self.compute.first_axis_shared)
            missing = [axis for axis, letter in enumerate(of_out) if letter not in outputs]
            out = self.compute.product(x, kernel, equation, self.result, self.precision)
            out = self.compute.add_bias(out, bias, missing, self.bias_by_product)
        else:
            out = self.compute.add_bias(self._product(x.reshape(-1, *inputs), kernel), bias, [0])
            out = out.reshape(*x.shape[: x.ndim - self.in_axes], *self.features)
        # Named so that a remat policy can keep it with its bias.
        return checkpoint_name(out, "linear")

    def _product(self, tokens: Array, kernel: Array) -> Array:
        """tokens (T, *inputs) times kernel (*inputs, *features) -> (T, *features)."""
        out = self.compute.quantized_product(tokens, kernel, self.in_axes) if self.quantized else None
        if out is not None:
            return out
        if self.compute.splits_inner_axes:
            # As one matrix the kernel would be gathered.
            letters = "abcdefgh"[: kernel.ndim]
            inputs, outputs = letters[: self.in_axes], letters[self.in_axes :]
            equation = f"t{inputs},{letters}->t{outputs}"
            return self.compute.product(tokens, kernel, equation, self.result, self.precision)
        # The gradient of one matrix comes out as the kernel is stored.
        rows = math.prod(tokens.shape[1:])
        tokens, kernel = tokens.reshape(-1, rows), kernel.reshape(rows, -1)
        out = self.compute.product(tokens, kernel, "td,df->tf", self.result, self.precision)
        return out.reshape(-1, *self.features)
