"""Low-rank adaptation (Hu et al., arXiv 2106.09685): a network's products of attention and MLP, each moved by a
product of two thin matrices, which alone are trained.

The two stand in the parameters beside the network's own, under `lora/` and the path of the kernel that they move:
"down" in the kernel's place of outputs, "up" in its place of inputs. The network is applied with their product added
to its kernels, so that no module and no kernel knows of them.

Letters: L layers, D width, H heads, K channels of a head, P of q, k, v or k, v, F hidden width, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from dit_jax.config import ConfigError, LoraConfig

LORA = "lora"
Params = dict[str, Any]

# The end of a kernel's path -> its axes, and those of down and up. R is the rank.
TARGETS = (
    (r"attn2?/(context_)?qkv", "ldphk", "ldpr", "lrphk"),
    (r"cross_attn/kv", "ldphk", "ldpr", "lrphk"),
    (r"cross_attn/q", "ldhk", "ldr", "lrhk"),
    (r"(cross_)?attn2?/(context_)?proj", "lhkd", "lhkr", "lrd"),
    (r"(context_)?mlp/fc[12]", "ldf", "ldr", "lrf"),
)


def with_lora(params: Params, config: LoraConfig, key: jax.Array) -> Params:
    """The parameters and first matrices of rank R: down normal with variance 1 / R, up zero, as the paper begins.

    Raises ConfigError for a network without layers of attention or MLP, and for a rank that is none.
    """
    added: dict[tuple[str, ...], Params] = {}
    for number, (path, kernel, (_, whole, down, up)) in enumerate(_targets(params)):
        sizes = dict(zip(whole, kernel.shape, strict=True)) | {"r": config.rank}
        inputs = kernel.size // kernel.shape[0] // _size(sizes, up, without="lr")
        if config.rank > inputs:
            raise ConfigError(
                f"--lora.rank is {config.rank}; expected at most {inputs}, the inputs of {path}"
            )
        shapes = [tuple(sizes[axis] for axis in axes) for axes in (down, up)]
        scale = config.rank**-0.5
        added[tuple(path.split("/"))] = {
            "down": scale * jax.random.normal(jax.random.fold_in(key, number), shapes[0], jnp.float32),
            "up": jnp.zeros(shapes[1], jnp.float32),
        }
    if not added:
        raise ConfigError(f"--lora.rank is {config.rank}; expected 0: this network has no products to adapt")
    return {**params, LORA: traverse_util.unflatten_dict(added)}


def merged(params: Mapping[str, Any], config: LoraConfig) -> Params:
    """The network's own parameters, moved: kernel + alpha / R * down @ up. As they are where there is no `lora/`."""
    own = {name: value for name, value in params.items() if name != LORA}
    if LORA not in params:
        return own
    thin = traverse_util.flatten_dict(params[LORA])
    moved = traverse_util.flatten_dict(own)
    for path, kernel, (_, whole, down, up) in _targets(own):
        name = tuple(path.split("/"))
        pair = thin[*name, "down"], thin[*name, "up"]
        change = jnp.einsum(f"{down},{up}->{whole}", *pair, precision=jax.lax.Precision.HIGHEST)
        moved[*name, "kernel"] = kernel + config.scale * change
    return traverse_util.unflatten_dict(moved)


def only_lora(new: Any, old: Any) -> Any:
    """Parameters of which nothing but `lora/`, where there is one, has moved from `old`; the rest to the bit."""
    return {**old, LORA: new[LORA]} if isinstance(old, dict) and LORA in old else new


def frozen_but_lora(params: Any) -> Any:
    """Parameters of which `lora/`, where there is one, alone has a gradient."""
    return only_lora(params, jax.lax.stop_gradient(params)) if LORA in params else params


def labels(params: Params) -> Any:
    """For `optax.partition`: "trained" or "frozen", of every parameter."""
    return {
        name: jax.tree.map(lambda _, name=name: "trained" if name == LORA else "frozen", value)
        for name, value in params.items()
    }


def _targets(params: Params) -> Iterator[tuple[str, Any, tuple[str, str, str, str]]]:
    """(path of the layer, its kernel, its row of TARGETS)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, _, last = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
        row = next((row for row in TARGETS if re.search(f"(^|/){row[0]}$", name)), None)
        if last == "kernel" and row is not None and leaf.ndim == len(row[1]):
            yield name, leaf, row


def _size(sizes: Mapping[str, int], axes: str, without: str) -> int:
    size = 1
    for axis in axes:
        size *= 1 if axis in without else sizes[axis]
    return size
