"""The seam between two branches of a block as one pass over the tokens, in Pallas for GPUs (Triton).

    x' = x + gate * branch                          the residual stream
    y  = (x' - mean) * rstd * (1 + scale) + shift   what the next branch reads (LayerNorm: arXiv 1607.06450)

The forward pass reads x and branch once and writes x' and y once; the backward pass reads x', branch and the
gradients of x' and y once and writes those of x and branch once. In between it keeps x', branch and, per token, mean
and rstd. Each program takes some tokens of one image, one after the other, so that gate, shift and scale are read
once for all of them and their gradients summed in registers; sums are in a fixed order, without atomics.

Triton's arrays have a power of two of elements. A row is therefore taken in pieces, 1152 = 1024 + 128: loads need no
mask, and no lane is idle, as 896 of 2048 would be.

On a CPU the kernels are interpreted: slow, for tests.

Letters: B batch, N tokens, D width, T tokens of a program, P = N / T programs of an image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from dit_jax.config import ConfigError
from dit_jax.models.norms import EPSILON

Array = jax.Array
Row = list[Array]  # the pieces of D channels, float32

# Most tokens of a program. Forward, few are enough to share gate, shift and scale; backward, each program also writes
# three float32 rows of partial sums: with 32 tokens 6% of the bytes.
FORWARD_TOKENS, BACKWARD_TOKENS = 8, 32


def check_norm_kernel(kernel: str, conditioning: str, platform: str | None = None) -> None:
    """ConfigError unless the kernel ("xla" or "pallas") serves this conditioning on `platform` (None: the default
    backend)."""
    if kernel not in ("xla", "pallas"):
        raise ConfigError(f"--compute.norm-kernel is {kernel!r}; expected xla or pallas")
    if kernel == "xla":
        return
    if conditioning not in ("adaln", "adaln_zero"):
        raise ConfigError(
            f"--compute.norm-kernel is pallas; expected xla, because --model.conditioning is {conditioning}"
        )
    if (platform or jax.default_backend()) == "tpu":
        raise ConfigError(
            "--compute.norm-kernel is pallas; expected xla on a TPU, because the kernel is for GPUs"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def gate_residual_modulate(
    x: Array,
    branch: Array | None,
    gate: Array | None,
    shift: Array,
    scale: Array,
    dtype: Any,
    sharding: Any = None,
    epsilon: float = EPSILON,
) -> tuple[Array, Array]:
    """x' = x + gate * branch, and its modulated norm.

    Args:
      x: the residual stream (B, N, D), float32 or bfloat16. Statistics are those of x' as rounded to x's type.
      branch: (B, N, D), or None: nothing is added, and x' is x. Taking x' from here all the same joins the
        gradient of the residual stream in the kernel's backward pass.
      gate: (B, D), or None: 1.
      shift, scale: (B, D).
      dtype: of the modulated norm.
      sharding: the `NamedSharding` of the batch, None on one device. Each device then works on its own images.
      epsilon: added to the variance.

    Returns:
      x' (B, N, D) in x's type and norm(x') * (1 + scale) + shift (B, N, D) in `dtype`.
    """
    return _forward(x, branch, gate, shift, scale, dtype, sharding, epsilon)[0]


def _forward(
    x: Array,
    branch: Array | None,
    gate: Array | None,
    shift: Array,
    scale: Array,
    dtype: Any,
    sharding: Any,
    epsilon: float,
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    inputs = _present(x=x, branch=branch, gate=gate, shift=shift, scale=scale)
    outputs = {"y": dtype, "mean": jnp.float32, "rstd": jnp.float32}
    if branch is not None:
        outputs["sum"] = x.dtype
    kernel = functools.partial(_forward_kernel, epsilon=epsilon)
    out = _run(kernel, inputs, outputs, FORWARD_TOKENS, sharding)
    x = out.get("sum", x)
    return (x, out["y"]), (x, branch, gate, shift, scale, out["mean"], out["rstd"])


def _backward(
    dtype: Any, sharding: Any, epsilon: float, saved: tuple[Any, ...], grads: tuple[Array, Array]
) -> tuple[Any, ...]:
    x, branch, gate, shift, scale, mean, rstd = saved
    inputs = {"x": x, "scale": scale, "mean": mean, "rstd": rstd, "of_sum": grads[0], "of_y": grads[1]}
    outputs = {"of_x": x.dtype, "of_shift": jnp.float32, "of_scale": jnp.float32}
    if gate is not None:
        inputs |= {"branch": branch, "gate": gate}
        outputs |= {"of_branch": branch.dtype, "of_gate": jnp.float32}
    out = _run(_backward_kernel, inputs, outputs, BACKWARD_TOKENS, sharding)

    def of_vector(name: str, vector: Array) -> Array:
        return out[name].sum(axis=1).astype(vector.dtype)  # over the P programs of an image

    of_branch = of_gate = None
    if gate is not None:
        of_branch, of_gate = out["of_branch"], of_vector("of_gate", gate)
    elif branch is not None:
        of_branch = out["of_x"].astype(branch.dtype)
    return out["of_x"], of_branch, of_gate, of_vector("of_shift", shift), of_vector("of_scale", scale)


gate_residual_modulate.defvjp(_forward, _backward)


# ---------------------------------------------------------------------------------------------- kernels


def _forward_kernel(inputs: Mapping[str, Any], outputs: Mapping[str, Any], epsilon: float) -> None:
    """Tokens (T, D) of one image: from x, branch, gate (D), shift (D), scale (D) to sum, y, mean (T), rstd (T)."""
    tokens, width = inputs["x"].shape
    shift, scale = _load(inputs["shift"]), _load(inputs["scale"])
    gate = _load(inputs["gate"]) if "gate" in inputs else None

    def token(i: Array, none: None) -> None:
        x = _load(inputs["x"], i)
        if "branch" in inputs:
            branch = _load(inputs["branch"], i)
            x = _each(lambda x, b: x + b, x, branch if gate is None else _each(jnp.multiply, gate, branch))
            x = _store(outputs["sum"], i, x)
        mean = _total(x) / width
        x = _each(lambda x: x - mean, x)
        rstd = 1.0 / jnp.sqrt(_total(_each(jnp.square, x)) / width + epsilon)
        _store(outputs["y"], i, _each(lambda x, a, b: x * rstd * (1.0 + a) + b, x, scale, shift))
        outputs["mean"][i], outputs["rstd"][i] = mean, rstd

    jax.lax.fori_loop(0, tokens, token, None)


def _backward_kernel(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Tokens (T, D) of one image: from x', branch, gate, scale, mean, rstd and the gradients of x' and y to the
    gradients of x and branch, and these tokens' part (D) of those of shift, scale and gate."""
    tokens, width = inputs["x"].shape
    scale = _load(inputs["scale"])
    gate = _load(inputs["gate"]) if "gate" in inputs else None

    def token(i: Array, sums: list[Row]) -> list[Row]:
        mean, rstd = inputs["mean"][i], inputs["rstd"][i]
        normal = _each(lambda x: (x - mean) * rstd, _load(inputs["x"], i))
        of_y = _load(inputs["of_y"], i)
        of_normal = _each(lambda g, a: g * (1.0 + a), of_y, scale)
        average = _total(of_normal) / width
        along = _total(_each(jnp.multiply, of_normal, normal)) / width
        of_sum = _load(inputs["of_sum"], i)
        of_x = _each(lambda s, g, n: s + rstd * (g - average - n * along), of_sum, of_normal, normal)
        _store(outputs["of_x"], i, of_x)
        terms = [of_y, _each(jnp.multiply, of_y, normal)]
        if gate is not None:
            _store(outputs["of_branch"], i, _each(jnp.multiply, gate, of_x))
            terms.append(_each(jnp.multiply, of_x, _load(inputs["branch"], i)))
        return [_each(jnp.add, total, term) for total, term in zip(sums, terms, strict=True)]

    names = ["of_shift", "of_scale", *(["of_gate"] if gate is not None else [])]
    zeros = [_each(jnp.zeros_like, scale) for _ in names]
    for name, row in zip(names, jax.lax.fori_loop(0, tokens, token, zeros), strict=True):
        _store(outputs[name], None, row)


def _pieces(width: int) -> list[Any]:
    """Slices that make up `width` channels, each as long as a power of two, the longest first."""
    slices, start = [], 0
    while start < width:
        size = 1 << ((width - start).bit_length() - 1)
        slices.append(pl.ds(start, size))
        start += size
    return slices


def _load(ref: Any, token: Array | None = None) -> Row:
    """A row of ref (D) or, at a token, of ref (T, D)."""
    pieces = _pieces(ref.shape[-1])
    return [ref[piece if token is None else (token, piece)].astype(jnp.float32) for piece in pieces]


def _store(ref: Any, token: Array | None, row: Row) -> Row:
    """Write the row as `_load` reads it, and return what it is when rounded to the ref's type."""
    row = _each(lambda piece: piece.astype(ref.dtype), row)
    for piece, value in zip(_pieces(ref.shape[-1]), row, strict=True):
        ref[piece if token is None else (token, piece)] = value
    return _each(lambda piece: piece.astype(jnp.float32), row)


def _each(function: Callable[..., Array], *rows: Row) -> Row:
    return [function(*pieces) for pieces in zip(*rows, strict=True)]


def _total(row: Row) -> Array:
    return sum(jnp.sum(piece) for piece in row)  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------- calling


def _present(**arrays: Array | None) -> dict[str, Array]:
    return {name: array for name, array in arrays.items() if array is not None}


def _tokens(n: int, most: int) -> int:
    """T: the largest divisor of N up to `most`, so that no program has tokens of two images."""
    return max(t for t in range(1, min(n, most) + 1) if n % t == 0)


def _run(
    kernel: Callable[..., None],
    inputs: dict[str, Array],
    outputs: dict[str, Any],
    most_tokens: int,
    sharding: Any,
) -> dict[str, Array]:
    """The kernel's outputs, whose types are given by name, over all images; every device does its own images."""

    def call(inputs: dict[str, Array], interpret: bool) -> dict[str, Array]:
        b, n, d = inputs["x"].shape
        t = _tokens(n, most_tokens)
        shapes, blocks = _layout(b, n, d, t)
        kernel_call = pl.pallas_call(
            kernel,
            grid=(b, n // t),
            in_specs=[{name: blocks[name] for name in inputs}],
            out_specs={name: blocks[name] for name in outputs},
            out_shape={name: jax.ShapeDtypeStruct(shapes[name], dtype) for name, dtype in outputs.items()},
            compiler_params=triton.CompilerParams(num_warps=_warps(d)),
            interpret=interpret,
        )
        return kernel_call(inputs)

    def local(inputs: dict[str, Array]) -> dict[str, Array]:
        interpreted, compiled = (functools.partial(call, interpret=flag) for flag in (True, False))
        return jax.lax.platform_dependent(inputs, cpu=interpreted, default=compiled)

    if sharding is None:
        return local(inputs)
    # The compiler cannot split a kernel: left to itself it would gather the batch for it.
    split = PartitionSpec(sharding.spec[0])
    mapped: Any = jax.shard_map(
        local, mesh=sharding.mesh, in_specs=(split,), out_specs=split, check_vma=False
    )
    return mapped(inputs)


def _layout(b: int, n: int, d: int, t: int) -> tuple[dict[str, tuple[int, ...]], dict[str, pl.BlockSpec]]:
    """Of every array of the kernels its shape, and the part of it that program p of image b has."""
    tokens = (b, n, d), pl.BlockSpec((None, t, d), lambda b, p: (b, p, 0))
    per_token = (b, n), pl.BlockSpec((None, t), lambda b, p: (b, p))
    per_image = (b, d), pl.BlockSpec((None, d), lambda b, p: (b, 0))
    partial_sum = (b, n // t, d), pl.BlockSpec((None, None, d), lambda b, p: (b, p, 0))
    layout: dict[str, tuple[Any, pl.BlockSpec]] = dict.fromkeys(
        ("x", "branch", "sum", "y", "of_sum", "of_y", "of_x", "of_branch"), tokens
    )
    layout |= dict.fromkeys(("mean", "rstd"), per_token) | dict.fromkeys(
        ("gate", "shift", "scale"), per_image
    )
    layout |= dict.fromkeys(("of_gate", "of_shift", "of_scale"), partial_sum)
    return {name: of[0] for name, of in layout.items()}, {name: of[1] for name, of in layout.items()}


def _warps(width: int) -> int:
    """Warps of 32 threads with 8 to 15 channels each, 8 at most: 4 for a width of 1152."""
    return 1 << (min(max(width // 256, 1), 8).bit_length() - 1)
