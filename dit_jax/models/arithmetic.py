"""The multiply-accumulates of a traced function, counted in its jaxpr.

Counted are matrix products, as often as the loops around them run, and one multiply-accumulate per element of what is
marked as `modulated`: the convention under which the DiT paper's figures come out (arXiv 2212.09748, table 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr

MODULATED = "modulated"

# They multiply, but a jaxpr does not say how often.
_UNKNOWN = {
    "pallas_call": "a kernel of its own",
    "ffi_call": "a kernel of its own",
    "custom_call": "a kernel of its own",
    "conv_general_dilated": "a convolution",
    "ragged_dot_general": "a ragged product",
}


def modulated(x: jax.Array) -> jax.Array:
    """x, scaled and shifted by vectors of the condition, as a mark for `count_macs`."""
    return checkpoint_name(x, MODULATED)


def count_macs(function: Callable[..., Any], *args: Any) -> int:
    """MACs of one call of a function with arguments of these shapes and types; nothing is computed.

    Raises ValueError where an operation's products cannot be counted: a kernel that is not made of jax's own
    operations, or a loop whose end hangs on values.
    """
    return _macs(jax.make_jaxpr(function)(*args).jaxpr)


def _macs(jaxpr: Jaxpr) -> int:
    return sum(_macs_of(equation) for equation in jaxpr.eqns)


def _macs_of(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "name":
        return equation.outvars[0].aval.size if params["name"] == MODULATED else 0
    if name in _UNKNOWN:
        raise ValueError(f"{name} is {_UNKNOWN[name]}: its multiply-accumulates cannot be counted")
    inner = [_macs(jaxpr) for jaxpr in _bodies(params)]
    if name == "while" and any(inner):
        raise ValueError(
            "products are in a while loop, which runs an unknown number of times; expected a scan"
        )
    if name == "cond":  # one branch runs
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":  # every device runs it on its part
        return params["mesh"].size * sum(inner)
    return sum(inner)


def _bodies(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The functions that an operation calls."""
    for value in params.values():
        for found in value if isinstance(value, tuple | list) else (value,):
            if isinstance(found, ClosedJaxpr):
                yield found.jaxpr
            elif isinstance(found, Jaxpr):
                yield found
