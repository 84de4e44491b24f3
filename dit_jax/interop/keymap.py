"""Names of a PyTorch state dict <-> paths of Flax parameters, one table used in both directions.

A `Rule` says, for the Flax paths a pattern matches, which tensor or tensors of the state dict hold the parameter,
and in which layout. A parameter may stack layers, or join parts, that are tensors of their own on the other side.
The Flax model's own parameter shapes are the measure: every tensor must be there, none may be left over, each must
have the right shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
Path = str  # a Flax parameter's path, joined by "/"
Shape = tuple[int, ...]


# -------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """How one tensor is laid out on either side; `to_flax` is told the shape of the Flax array."""

    to_flax: Callable[[Array, Shape], Array]
    to_torch: Callable[[Array], Array]


def linear(in_axes: int = 1) -> Layout:
    """A Linear's weight (out, in) <-> a kernel (*in, *out), the first `in_axes` axes of which are inputs."""
    return Layout(
        lambda x, shape: x.T.reshape(shape),
        lambda x: x.reshape(math.prod(x.shape[:in_axes]), -1).T,
    )


def patches(side: int) -> Layout:
    """A convolution (D, C, P, P) of stride P <-> the kernel (P*P*C, D) of flattened patches of that side."""
    return Layout(
        lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
        lambda x: x.reshape(side, side, -1, x.shape[-1]).transpose(3, 2, 0, 1),
    )


def reversed_along(axis: int, layout: Layout) -> Layout:
    """`layout` of an array whose entries along a Flax axis come in the other order: (scale, shift), say."""
    return Layout(
        lambda x, shape: np.flip(layout.to_flax(x, shape), axis),
        lambda x: layout.to_torch(np.flip(x, axis)),
    )


SAME = Layout(lambda x, _: x, lambda x: x)
FLAT = Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))  # a bias of several axes
LINEAR = linear()
CONV = Layout(lambda x, _: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO


# ---------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    """Flax paths that match `pattern` in full <-> the state dict's name `name`.

    `name` may refer to the pattern's groups (`\\1`). A `*` in it stands for a layer's number: the Flax parameter
    stacks those tensors along `layer_axis`. Alternatives in it, such as `to_{q,k,v}`, are tensors that the Flax
    parameter (of one layer) has side by side along `part_axis`. A `#` in it stands for the numbers below `copies`:
    the format repeats the tensor that many times.
    """

    pattern: str
    name: str
    layout: Layout = SAME
    layer_axis: int = 0
    part_axis: int = 0
    copies: int = 1
    first: int = 0
    """Number of the first of the stacked layers."""

    def applies(self, path: Path) -> bool:
        """Whether the rule is for the parameter `path`."""
        return re.fullmatch(self.pattern, path) is not None

    def split(self, path: Path, value: Array) -> dict[str, Array]:
        """The parameter `path` as views that each belong to one tensor, by its name."""
        match = re.fullmatch(self.pattern, path)
        assert match is not None
        name = match.expand(self.name)
        if "#" in name:
            return {name.replace("#", str(i)): value for i in range(self.copies)}
        views = {name: value}
        if "*" in name:
            layers = np.moveaxis(value, self.layer_axis, 0)
            views = {name.replace("*", str(i)): layer for i, layer in enumerate(layers, self.first)}
        parts = re.search(r"\{(.*?)\}", name)
        if parts is None:
            return views
        names = parts[1].split(",")
        return {
            tensor.replace(parts[0], part): piece
            for tensor, view in views.items()
            for part, piece in zip(names, np.split(view, len(names), self.part_axis), strict=True)
        }


def layer(path: str, name: str, layout: Layout = LINEAR, axis: int = 0, **how: Any) -> tuple[Rule, Rule]:
    """The rules of a Linear layer; `axis` is the kernel's layer axis, a bias has it first. how: of both rules, but
    that a kernel has its parts one axis further, after its inputs."""
    parts = {"part_axis": 1} if "{" in name else {}
    return (
        Rule(f"{path}/kernel", f"{name}.weight", layout, axis, **parts, **how),
        Rule(f"{path}/bias", f"{name}.bias", FLAT, **how),
    )


@dataclass(frozen=True)
class Constant:
    """A tensor that the format stores and our model computes; where it is missing, nothing is lost."""

    value: Array
    what: str
    """What its values are, for the error where they are others."""


@dataclass(eq=False)
class MismatchError(ValueError):
    """A state dict does not fit the model."""

    source: str
    missing: dict[str, Shape] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    misshapen: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # found, expected
    other: list[str] = field(default_factory=list)  # constants of other values

    def __str__(self) -> str:
        kinds = {
            "missing": [f"{name} {shape}" for name, shape in self.missing.items()],
            "unexpected": self.unexpected,
            "misshapen": [f"{name} is {found}, expected {shape}" for name, (found, shape) in self.misshapen.items()],
            "of other values": self.other,
        }  # fmt: skip
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        return f"{self.source} does not fit the model: {listed}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[Path, Any]:
    """Nested parameters as {path: leaf}."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


# --------------------------------------------------------------------------------------- the two ways


def _rule(rules: Sequence[Rule], path: Path) -> Rule:
    """The first rule that applies to a parameter."""
    for rule in rules:
        if rule.applies(path):
            return rule
    raise KeyError(f"no rule names the tensor of the Flax parameter {path}")


def to_flax(
    state_dict: Mapping[str, Array],
    shapes: Mapping[str, Any],
    rules: Sequence[Rule],
    source: str,
    constants: Mapping[str, Constant] | None = None,
) -> dict[str, Any]:
    """Flax parameters, float32, from a state dict.

    shapes: the model's parameters or their `jax.eval_shape`. Raises MismatchError, naming `source` and listing
    every missing, unexpected and misshapen tensor, and every constant of other values.
    """
    problems = MismatchError(source)
    left = set(state_dict)
    flat = {}
    for path, leaf in flatten(shapes).items():
        rule = _rule(rules, path)
        flat[path] = np.empty(leaf.shape, np.float32)
        views = rule.split(path, flat[path])
        first = next(iter(views))
        for name, view in views.items():
            left.discard(name)
            expected = rule.layout.to_torch(np.broadcast_to(np.float32(0), view.shape)).shape
            if name not in state_dict:
                problems.missing[name] = expected
            elif state_dict[name].shape != expected:
                problems.misshapen[name] = (state_dict[name].shape, expected)
            else:
                given = rule.layout.to_flax(state_dict[name], view.shape)
                if (
                    rule.copies > 1
                    and name != first
                    and first in state_dict
                    and not np.array_equal(given, view)
                ):
                    problems.other.append(f"{name} is not the copy of {first} that it should be")
                    continue
                view[...] = given
    for name, constant in (constants or {}).items():
        if name not in left:
            continue
        left.discard(name)
        found = state_dict[name]
        if found.shape != constant.value.shape:
            problems.misshapen[name] = (found.shape, constant.value.shape)
        elif not np.allclose(found.astype(np.float32), constant.value, atol=_rounding(found.dtype)):
            problems.other.append(f"{name} is not {constant.what}")
    problems.unexpected = sorted(left)
    if problems.missing or problems.unexpected or problems.misshapen or problems.other:
        raise problems
    return unflatten(flat)


def _rounding(dtype: Any) -> float:
    """How far a constant of about 1 may be off that was stored in this type."""
    import ml_dtypes

    return max(1e-5, float(ml_dtypes.finfo(dtype).eps)) if dtype.itemsize < 4 else 1e-5


def to_torch(
    params: Mapping[str, Any], rules: Sequence[Rule], constants: Mapping[str, Constant] | None = None
) -> dict[str, Array]:
    """The state dict of Flax parameters, in their own dtype, and of the constants: the inverse of `to_flax`."""
    state_dict = {name: constant.value for name, constant in (constants or {}).items()}
    for path, leaf in flatten(params).items():
        rule = _rule(rules, path)
        for name, view in rule.split(path, np.asarray(leaf)).items():
            state_dict[name] = np.ascontiguousarray(rule.layout.to_torch(view))
    return state_dict
