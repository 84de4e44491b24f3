"""Names of a PyTorch state dict <-> paths of Flax parameters, one table used in both directions.

A `Rule` says, for the Flax paths a pattern matches, which tensor (or, for layers stacked along a first
axis, which tensors) of the state dict holds the parameter and in which layout. The Flax model's own parameter
shapes are the measure: every tensor must be there, none may be left over, each must have the right shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Path = str  # a Flax parameter's path, joined by "/"


@dataclass(frozen=True)
class Layout:
    """How one tensor is laid out on either side."""

    to_flax: Callable[[Array], Array]
    to_torch: Callable[[Array], Array]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)  # (out, in) <-> (in, out)
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO


@dataclass(frozen=True)
class Rule:
    """Flax paths that match `pattern` in full <-> the state dict's name `name`.

    `name` may refer to the pattern's groups (`\\1`). A `*` in it stands for a layer's number: the Flax
    parameter then stacks those tensors along its first axis.
    """

    pattern: str
    name: str
    layout: Layout = SAME

    def names(self, path: Path, shape: Sequence[int]) -> list[str] | None:
        """The tensors that hold the parameter `path`, or None where the rule does not apply."""
        match = re.fullmatch(self.pattern, path)
        if match is None:
            return None
        name = match.expand(self.name)
        return [name.replace("*", str(i)) for i in range(shape[0])] if "*" in name else [name]


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


def _entries(rules: Sequence[Rule], shapes: Mapping[Path, Any]) -> dict[Path, tuple[Rule, list[str]]]:
    """For every parameter its rule (the first that applies) and its tensors' names."""
    entries = {}
    for path, leaf in shapes.items():
        found = ((rule, names) for rule in rules if (names := rule.names(path, leaf.shape)) is not None)
        entry = next(found, None)
        if entry is None:
            raise KeyError(f"no rule names the tensor of the Flax parameter {path}")
        entries[path] = entry
    return entries


def to_flax(
    state_dict: Mapping[str, Array], shapes: Mapping[str, Any], rules: Sequence[Rule], source: str
) -> dict[str, Any]:
    """Flax parameters, float32, from a state dict.

    shapes: the model's parameters or their `jax.eval_shape`. Raises ValueError, naming `source` and listing
    every missing, unexpected and misshapen tensor.
    """
    flat_shapes = flatten(shapes)
    left = set(state_dict)
    missing, misshapen, flat = [], [], {}
    for path, (rule, names) in _entries(rules, flat_shapes).items():
        shape = tuple(flat_shapes[path].shape)
        stacked = "*" in rule.name
        expected = rule.layout.to_torch(np.broadcast_to(np.float32(0), shape[1:] if stacked else shape)).shape
        parts = []
        for name in names:
            left.discard(name)
            if name not in state_dict:
                missing.append(f"{name} {expected}")
            elif state_dict[name].shape != expected:
                misshapen.append(f"{name} is {state_dict[name].shape}, expected {expected}")
            else:
                parts.append(rule.layout.to_flax(state_dict[name]).astype(np.float32))
        if len(parts) == len(names):
            flat[path] = np.stack(parts) if stacked else np.ascontiguousarray(parts[0])
    problems = (("missing", missing), ("unexpected", sorted(left)), ("misshapen", misshapen))
    if any(found for _, found in problems):
        listed = "; ".join(f"{kind}: {', '.join(found)}" for kind, found in problems if found)
        raise ValueError(f"{source} does not fit the model: {listed}")
    return unflatten(flat)


def to_torch(params: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, Array]:
    """The state dict of Flax parameters, in their own dtype: the inverse of `to_flax`."""
    flat = flatten(params)
    state_dict = {}
    for path, (rule, names) in _entries(rules, flat).items():
        leaf = np.asarray(flat[path])
        parts = leaf if "*" in rule.name else leaf[None]
        for name, part in zip(names, parts, strict=True):
            state_dict[name] = np.ascontiguousarray(rule.layout.to_torch(part))
    return state_dict
