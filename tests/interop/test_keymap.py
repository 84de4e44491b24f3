"""The table of names, in both directions."""

import jax
import numpy as np
import pytest

from dit_jax.interop import keymap
from dit_jax.interop.keymap import CONV, FLAT, LINEAR, Constant, Rule, linear, patches, reversed_along

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


def check_round_trip(rules, shape, tensors):
    """The parameter of that shape from the tensors, which come back as they were."""
    shapes = {"p": jax.ShapeDtypeStruct(shape, np.float32)}
    params = keymap.to_flax(tensors, shapes, rules, "file")
    back = keymap.to_torch(params, rules)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
    return params["p"]


def random(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def test_layers_may_be_stacked_along_another_axis():
    tensors = {f"blocks.{i}.weight": random(6, 4) + i for i in range(3)}
    kernel = check_round_trip((Rule("p", "blocks.*.weight", LINEAR, 1),), (4, 3, 2, 3), tensors)
    np.testing.assert_array_equal(kernel[:, 2].reshape(4, 6), tensors["blocks.2.weight"].T)


def test_inputs_and_outputs_may_have_several_axes():
    weight = {"weight": random(5, 6)}
    kernel = check_round_trip((Rule("p", "weight", linear(in_axes=2)),), (2, 3, 5), weight)
    np.testing.assert_array_equal(kernel[1, 2], weight["weight"][:, 5])
    bias = {"bias": random(6)}
    assert check_round_trip((Rule("p", "bias", FLAT),), (2, 3), bias)[1, 0] == bias["bias"][3]


def test_a_fused_parameter_from_separate_tensors():
    tensors = {f"b.{i}.to_{part}.weight": random(6, 4) + i for i in range(2) for part in "qkv"}
    rule = Rule("p", "b.*.to_{q,k,v}.weight", LINEAR, part_axis=1)
    kernel = check_round_trip((rule,), (2, 4, 3, 2, 3), tensors)  # (L, D, 3, H, K)
    np.testing.assert_array_equal(kernel[1, :, 2].reshape(4, 6), tensors["b.1.to_v.weight"].T)


def test_parts_in_another_order():
    weight = {"weight": random(6, 4)}
    kernel = check_round_trip((Rule("p", "weight", reversed_along(1, LINEAR)),), (4, 2, 3), weight)
    np.testing.assert_array_equal(kernel[:, 0], weight["weight"][3:].T)


def test_patches_are_rows_columns_channels():
    weight = {"weight": random(5, 3, 2, 2)}
    kernel = check_round_trip((Rule("p", "weight", patches(2)),), (12, 5), weight)
    np.testing.assert_array_equal(
        kernel[2 * 3 + 1], weight["weight"][:, 1, 1, 0]
    )  # row 1, column 0, channel 1


def test_a_constant_is_checked_and_written():
    constants = {"table": Constant(random(2, 3), "the table of this grid")}
    rules, shapes = (Rule("p", "w"),), {"p": jax.ShapeDtypeStruct((2,), np.float32)}
    tensors = keymap.to_torch({"p": random(2)}, rules, constants)
    assert set(tensors) == {"w", "table"}
    keymap.to_flax(tensors, shapes, rules, "file", constants)
    keymap.to_flax({"w": random(2)}, shapes, rules, "file", constants)  # nothing is lost without it
    with pytest.raises(ValueError, match="table is not the table of this grid"):
        keymap.to_flax(tensors | {"table": tensors["table"] + 0.1}, shapes, rules, "file", constants)
