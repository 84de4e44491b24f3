"""Networks that are told captions: masks, the null, derivatives, devices, cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from dit_jax import DiT, MMDiT
from dit_jax.conditions import TextCondition, byte_tokens
from dit_jax.config import Config, ModelConfig, TextConfig, resolve
from dit_jax.models.attention import attend
from dit_jax.models.cost import forward_macs
from dit_jax.models.create import build_model
from dit_jax.training.sharding import MESH_AXES, PRESETS, partition_spec

CONDITIONINGS = ("in_context", "cross_attention", "adaln", "adaln_zero")
M, E = 6, 12  # text tokens, and channels of those of a language model
KINDS = {"bytes": TextCondition("bytes", M), "embedded": TextCondition("some/model", M, E)}
SIZES = dict(input_size=(4, 6), in_channels=4, hidden_size=32, depth=2, num_heads=2)
NETWORKS = {
    **{name: functools.partial(DiT, **SIZES, conditioning=name, learn_sigma=False) for name in CONDITIONINGS},
    "mmdit": functools.partial(MMDiT, **SIZES, positions_side=8, positions_base=4),
}
EVERY = pytest.mark.parametrize("network", NETWORKS)


@functools.cache
def made(network, kind):
    """(the network, random parameters, jitted: (parameters, condition) -> output of two samples)."""
    model = NETWORKS[network](text=KINDS[kind], text_layers=1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 6, 4)).astype(np.float32)
    t = np.array([3.0, 500.0], np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t, given(kind))["params"]
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)

    def apply(params, condition, x=x, model=model):
        return model.apply({"params": params}, x, t, condition)

    return model, params, jax.jit(apply, static_argnames="model")


def given(kind, seed=1, mask=((1, 1, 1, 1, 0, 0), (1, 1, 0, 0, 0, 0))):
    if kind == "bytes":
        return {"tokens": byte_tokens(["abc", "x"], M)}
    context = np.random.default_rng(seed).standard_normal((2, M, E)).astype(np.float32)
    return {"context": context, "mask": np.asarray(mask, bool)}


@pytest.mark.parametrize("kernel", ["einsum", "xla"])
def test_masked_attention_is_the_formula(kernel):
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((3, n, 2, 8)).astype(np.float32) for n in (5, 7, 7))
    mask = rng.random((3, 7)) < 0.5
    mask[1], mask[2] = True, False
    k[~mask] *= 1e4  # what is not there has no say in the softmax's scale either
    expected = np.zeros((3, 5, 2, 8))
    for sample, head in np.ndindex(2, 2):
        there = mask[sample]
        logits = q[sample, :, head].astype(float) @ k[sample, there, head].T / np.sqrt(8)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        expected[sample, :, head] = weights / weights.sum(axis=1, keepdims=True) @ v[sample, there, head]
    found = attend(*map(jnp.asarray, (q, k, v)), kernel, jnp.asarray(mask))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda *a: jnp.sum(jnp.sin(attend(*a, kernel, mask))), (0, 1, 2))(q, k, v)
    for grad in grads:
        assert np.isfinite(grad).all() and not np.any(grad[2])
    assert not np.any(grads[2][~mask])


@EVERY
def test_text_under_the_mask_changes_nothing_to_the_bit(network):
    _, params, apply = made(network, "embedded")
    text = given("embedded")
    first = np.asarray(apply(params, text))
    for garbage in (7.0, np.nan, np.inf):
        other = np.where(text["mask"][..., None], text["context"], garbage).astype(np.float32)
        np.testing.assert_array_equal(apply(params, text | {"context": other}), first)


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_text_is_as_a_shorter_one(network, kind):
    _, params, apply = made(network, kind)
    whole = given(kind)
    cut = {name: value[:, :4] for name, value in whole.items()}
    np.testing.assert_allclose(apply(params, cut), apply(params, whole), rtol=1e-4, atol=1e-5)


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_one_token_more_or_another_changes_the_output_of_its_sample(network, kind):
    _, params, apply = made(network, kind)
    text = given(kind)
    first = np.asarray(apply(params, text))
    changes = {name: np.array(value) for name, value in text.items()}
    if kind == "bytes":
        others = [byte_tokens(["abd", "x"], M), byte_tokens(["ab", "x"], M), byte_tokens(["bac", "x"], M)]
        changed = [{"tokens": tokens} for tokens in others]
    else:
        changes["context"][0, 1] *= -1
        shorter = text["mask"].copy()
        shorter[0, 3] = False
        changed = [changes, text | {"mask": shorter}]
    for other in changed:
        out = np.asarray(apply(params, other))
        assert np.abs(out - first)[0].max() > 1e-5
        np.testing.assert_array_equal(out[1], first[1])


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_at_all_gives_numbers_forward_and_backward(network, kind):
    model, params, apply = made(network, kind)
    null = model.text.null if kind == "embedded" else {"tokens": np.zeros(M, np.int32)}
    none = {name: np.broadcast_to(null[name], (2, *field.shape)) for name, field in model.text.fields.items()}
    out, grads = jax.jit(
        jax.value_and_grad(lambda p: jnp.sum(jnp.sin(apply(p, none)))),
    )(params)
    assert np.isfinite(out)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@EVERY
def test_how_it_is_computed_changes_nothing_but_rounding(tiny, network):
    model, params, apply = made(network, "bytes")

    def value_and_grad(**options):
        computed = model.computed(**options)
        loss = lambda p: jnp.sum(jnp.sin(apply(p, given("bytes"), model=computed)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    expected = value_and_grad()
    options = [{"remat": "dots_attention", "unroll": True, "attention": "xla"}, {"attention": "tokens_last"}]
    for found in (value_and_grad(**one) for one in options):
        assert tiny.relative_difference(found, expected) < 1e-3
    out = np.asarray(apply(params, given("bytes")))
    rounded = np.asarray(apply(params, given("bytes"), model=model.computed(dtype=jnp.bfloat16)))
    assert 0 < np.linalg.norm(rounded - out) < 0.1 * np.linalg.norm(out)


@EVERY
def test_forward_mode_agrees_with_reverse_mode(network):
    model, params, _ = made(network, "bytes")
    rng = np.random.default_rng(3)
    x, dx, weights = rng.standard_normal((3, 2, 4, 6, 4)).astype(np.float32)

    def apply(x):
        return model.plain().apply({"params": params}, x, jnp.full((2,), 500.0), given("bytes"))

    along = jax.jit(lambda x, dx: jax.jvp(apply, (x,), (dx,))[1])(x, dx)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(weights * apply(x))))(x)
    np.testing.assert_allclose(np.sum(weights * along), np.sum(grad * dx), rtol=1e-4)


def test_a_number_that_is_no_byte_is_not_silently_another():
    _, params, apply = made("adaln_zero", "bytes")
    for wrong in (-1, 258):
        tokens = given("bytes")["tokens"].copy()
        tokens[0, 1] = wrong
        assert np.isnan(apply(params, {"tokens": tokens})[0]).all()


def test_a_condition_that_is_no_text_is_refused():
    model = DiT(**SIZES, text=KINDS["embedded"])
    with pytest.raises(ValueError, match="the condition has no context, mask; expected the arrays of a text"):
        model.init(jax.random.key(0), np.zeros((1, 4, 6, 4)), np.zeros(1), np.zeros(1, np.int32))


def test_at_first_the_output_is_zero_and_text_is_passed_by():
    """adaLN-Zero's blocks begin as the identity, with text as without."""
    model = DiT(**SIZES, text=KINDS["bytes"])
    x = np.ones((2, 4, 6, 4), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), x, np.ones(2), given("bytes"))["params"]
    assert not np.any(params["blocks"]["cross_attn"]["proj"]["kernel"])
    np.testing.assert_array_equal(model.apply({"params": params}, x, np.ones(2), given("bytes")), 0)


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_place_on_the_mesh(network, kind):
    _, params, _ = made(network, kind)
    mesh = AbstractMesh((1, 2, 2), MESH_AXES)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        for preset, both in PRESETS.items():
            for rules in both:
                spec = partition_spec(path, leaf.shape, rules, mesh, where_it_fits=preset == "zero1")
                assert any(spec) or "fsdp" not in preset or not path.endswith(("kernel", "embedding"))


MESHES = {
    "replicated": {"preset": "replicated"},
    "zero1": {"preset": "zero1"},
    "fsdp": {"preset": "fsdp", "data": 2, "fsdp": 4},
    "fsdp_tensor": {"preset": "fsdp_tensor", "data": 2, "fsdp": 2, "tensor": 2},
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("preset", "conditioning"),
    [
        ("fsdp_tensor", "adaln_zero"),
        *(pytest.param(p, "adaln_zero", marks=SLOW) for p in ("replicated", "zero1", "fsdp")),
        *(pytest.param("fsdp_tensor", c, marks=SLOW) for c in ("in_context", "cross_attention")),
    ],
)
def test_eight_devices_and_microbatches_agree_with_one(tiny, preset, conditioning):
    start, one, expected = one_device(tiny, conditioning)
    config = text_config(tiny, conditioning, mesh=MESHES[preset], train={"microbatch": 2})
    state, metrics, _ = tiny.run(config, 8, 1, start)
    np.testing.assert_allclose(metrics[0]["loss"], expected[0]["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["grad_norm"], expected[0]["grad_norm"], rtol=1e-4)
    found, of_one = (s.opt_state[1][0].mu for s in (state, one))  # 0.1 x the gradient and what was before
    assert tiny.relative_difference(found, of_one) < 1e-4


def text_config(tiny, conditioning, **parts):
    text = {"encoder": "bytes", "length": 16, "layers": 1}
    return tiny.config(model={"conditioning": conditioning, "depth": 1}, text=text, **parts)


@functools.cache
def one_device(tiny, conditioning):
    """(a state whose gates are not zero, the state after one step more, that step's metrics) on one device."""
    config = text_config(tiny, conditioning)
    start = jax.device_get(tiny.run(config, 1, 3)[0])
    return start, *tiny.run(config, 1, 1, start)[:2]


def test_the_arithmetic_of_text_is_counted():
    """Beside a network without labels: the projection of text, its vector, and a cross-attention in each block."""
    model = ModelConfig(name="DiT-S/2", depth=3, input_size=(8, 8), num_classes=0)
    plain = forward_macs(resolve(Config(model=model)))
    text = TextConfig(encoder="Qwen/Qwen3-0.6B", length=10)
    with_text = forward_macs(resolve(Config(model=model, text=text)))
    d, n, m, e = 384, 16, 10, 1024
    cross = 2 * n * d * d + 2 * m * d * d + 2 * n * m * d
    assert with_text - plain == m * e * d + e * d + d * d + 3 * cross


def test_a_config_makes_its_network():
    text = TextConfig(encoder="bytes", length=16, layers=3)
    model = ModelConfig(name="DiT-S/2", depth=1, hidden_size=32, num_heads=2, conditioning="in_context")
    built = build_model(resolve(Config(model=model, text=text)))
    assert built.text == built.condition == TextCondition("bytes", 16, dropout=0.1)
    assert built.text_layers == 3
    deeper = dataclasses.replace(built, text_layers=0)  # no block of its own is fine too
    shapes = jax.eval_shape(
        deeper.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), deeper.condition.in_turn(1)
    )["params"]
    assert "blocks" not in shapes["bytes_embed"]
