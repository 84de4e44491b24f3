"""The published DiT checkpoints: their state dict to and from our parameters.

Names and layouts are those of the original PyTorch implementation (adaLN-Zero models): Linear weights are
(out, in), the patch projection is a convolution (D, C, P, P), blocks are numbered, positions are stored.

Letters: D width, L layers, H heads, K channels of a head, P patch side, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import traverse_util

from dit_jax.models.dit import DiT
from dit_jax.models.embeddings import sincos_positions


@dataclass(frozen=True)
class _Entry:
    """One published tensor: its shape, and how it becomes a (slice of a) parameter and back."""

    shape: tuple[int, ...]
    path: str  # parameter, with / between names
    layer: int | None  # index on the parameter's layer axis
    layer_axis: int
    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


def _entries(model: DiT) -> dict[str, _Entry]:
    d, p, c, heads = model.hidden_size, model.patch_size, model.in_channels, model.num_heads
    hidden, out = int(d * model.mlp_ratio), p * p * model.out_channels
    entries: dict[str, _Entry] = {}

    def linear(
        name: str, path: str, fan_out: int, fan_in: int, split_in=None, split_out=None, layer=None, axis=0
    ):
        """A Linear layer; split_in / split_out are our kernel's axes where they are more than one."""
        ours_in, ours_out = split_in or (fan_in,), split_out or (fan_out,)
        entries[f"{name}.weight"] = _Entry(
            (fan_out, fan_in), f"{path}/kernel", layer, axis,
            lambda w: w.T.reshape(*ours_in, *ours_out),
            lambda k: k.reshape(fan_in, fan_out).T,
        )  # fmt: skip
        entries[f"{name}.bias"] = _Entry(
            (fan_out,), f"{path}/bias", layer, 0,
            lambda b: b.reshape(ours_out),
            lambda b: b.reshape(fan_out),
        )  # fmt: skip

    entries["x_embedder.proj.weight"] = _Entry(
        (d, c, p, p), "patch_embed/kernel", None, 0,
        lambda w: w.transpose(2, 3, 1, 0).reshape(p * p * c, d),
        lambda k: k.reshape(p, p, c, d).transpose(3, 2, 0, 1),
    )  # fmt: skip
    entries["x_embedder.proj.bias"] = _Entry((d,), "patch_embed/bias", None, 0, np.asarray, np.asarray)
    linear("t_embedder.mlp.0", "t_embed/fc1", d, 256)
    linear("t_embedder.mlp.2", "t_embed/fc2", d, d)
    if model.num_classes > 0:
        rows = model.num_classes + (1 if model.class_dropout_prob > 0 else 0)
        entries["y_embedder.embedding_table.weight"] = _Entry(
            (rows, d), "y_embed/embedding", None, 0, np.asarray, np.asarray
        )
    for i in range(model.depth):
        block, split = f"blocks.{i}", (heads, d // heads)
        linear(f"{block}.attn.qkv", "blocks/attn/qkv", 3 * d, d, split_out=(3, *split), layer=i)
        linear(f"{block}.attn.proj", "blocks/attn/proj", d, d, split_in=split, layer=i)
        linear(f"{block}.mlp.fc1", "blocks/mlp/fc1", hidden, d, layer=i)
        linear(f"{block}.mlp.fc2", "blocks/mlp/fc2", d, hidden, layer=i)
        linear(f"{block}.adaLN_modulation.1", "adaln", 6 * d, d, split_out=(6, d), layer=i, axis=1)
    linear("final_layer.linear", "final_linear", out, d)
    linear("final_layer.adaLN_modulation.1", "final_adaln", 2 * d, d, split_out=(2, d))
    return entries


def _checked_entries(model: DiT) -> dict[str, _Entry]:
    if model.conditioning != "adaln_zero":
        raise ValueError(
            f"the model's conditioning is {model.conditioning!r}; published checkpoints are adaln_zero"
        )
    return _entries(model)


def _positions(model: DiT) -> np.ndarray:
    return sincos_positions(*model.grid_size, model.hidden_size)[None]


def params_from_state_dict(state_dict: Mapping[str, Any], model: DiT) -> dict[str, Any]:
    """Our parameters from a published state dict (name -> array).

    Raises ValueError that lists every missing, unexpected or misshapen tensor, and when the stored position
    table is not the model's.
    """
    entries = _checked_entries(model)
    arrays = {name: np.asarray(value, np.float32) for name, value in state_dict.items()}
    positions = arrays.pop("pos_embed", None)
    problems = [f"missing {name} {entry.shape}" for name, entry in entries.items() if name not in arrays]
    problems += [f"unexpected {name}" for name in arrays if name not in entries]
    problems += [
        f"{name} has shape {arrays[name].shape}, expected {entry.shape}"
        for name, entry in entries.items()
        if name in arrays and arrays[name].shape != entry.shape
    ]
    if positions is not None:
        expected = _positions(model)
        if positions.shape != expected.shape:
            problems.append(f"pos_embed has shape {positions.shape}, expected {expected.shape}")
        elif not np.allclose(positions, expected, atol=1e-5):
            problems.append("pos_embed is not the 2D sine-cosine table of this grid")
    if problems:
        raise ValueError("the state dict does not fit the model: " + "; ".join(problems))
    layers: dict[str, list[np.ndarray]] = {}
    axes: dict[str, int | None] = {}
    for name, entry in entries.items():  # layers come in order
        layers.setdefault(entry.path, []).append(entry.load(arrays[name]))
        axes[entry.path] = None if entry.layer is None else entry.layer_axis
    flat = {
        path: parts[0] if axes[path] is None else np.stack(parts, axis=axes[path])  # type: ignore[arg-type]
        for path, parts in layers.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def state_dict_from_params(params: Mapping[str, Any], model: DiT) -> dict[str, np.ndarray]:
    """The published state dict of our parameters, positions included: inverse of `params_from_state_dict`."""
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    state = {"pos_embed": _positions(model)}
    for name, entry in _checked_entries(model).items():
        value = np.asarray(flat[entry.path], np.float32)
        part = value if entry.layer is None else np.take(value, entry.layer, axis=entry.layer_axis)
        state[name] = np.ascontiguousarray(entry.save(part))
    return state
