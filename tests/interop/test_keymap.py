"""The table of names, in both directions."""

import jax
import numpy as np
import pytest

from dit_jax.interop import keymap
from dit_jax.interop.keymap import CONV, LINEAR, Rule

RULES = (
    Rule(r"blocks/(\w+)/kernel", r"blocks.*.\1.weight", LINEAR),
    Rule(r"blocks/(\w+)/bias", r"blocks.*.\1.bias"),
    Rule(r"stem/kernel", r"conv.weight", CONV),
)
SHAPES = {
    "blocks": {
        "mlp": {
            "kernel": jax.ShapeDtypeStruct((2, 3, 5), np.float32),
            "bias": jax.ShapeDtypeStruct((2, 5), np.float32),
        }
    },
    "stem": {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 7), np.float32)},
}


def state_dict():
    rng = np.random.default_rng(0)
    shapes = {"conv.weight": (7, 2, 3, 3)}
    for i in range(2):
        shapes |= {f"blocks.{i}.mlp.weight": (5, 3), f"blocks.{i}.mlp.bias": (5,)}
    return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}


def test_layers_are_stacked_and_layouts_turned():
    tensors = state_dict()
    params = keymap.to_flax(tensors, SHAPES, RULES, "file")
    kernel = params["blocks"]["mlp"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1], tensors["blocks.1.mlp.weight"].T)
    # Element by element: Flax (row, column, in, out) is torch (out, in, row, column).
    stem, conv = params["stem"]["kernel"], tensors["conv.weight"]
    assert all(stem[i, j, k, m] == conv[m, k, i, j] for i, j, k, m in np.ndindex(stem.shape))


def test_round_trip():
    tensors = state_dict()
    back = keymap.to_torch(keymap.to_flax(tensors, SHAPES, RULES, "file"), RULES)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_every_problem_is_listed_at_once():
    tensors = state_dict()
    del tensors["blocks.1.mlp.bias"]
    tensors["head.weight"] = np.zeros((1,))
    tensors["conv.weight"] = tensors["conv.weight"][:, :1]
    expected = (
        r"my\.file does not fit the model: missing: blocks\.1\.mlp\.bias \(5,\); unexpected: head\.weight; "
        r"misshapen: conv\.weight is \(7, 1, 3, 3\), expected \(7, 2, 3, 3\)"
    )
    with pytest.raises(ValueError, match=expected):
        keymap.to_flax(tensors, SHAPES, RULES, "my.file")


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(KeyError, match="stem/kernel"):
        keymap.to_flax(state_dict(), SHAPES, RULES[:2], "file")


def test_flatten_inverts():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert keymap.flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert keymap.unflatten(keymap.flatten(tree)) == tree
