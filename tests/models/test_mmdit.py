"""MMDiT: published sizes, its first state, where its parameters are split, its derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from dit_jax import MMDiT
from dit_jax.config import MMDIT_SIZES, ConfigError
from dit_jax.models.embeddings import cropped_positions, sincos_positions
from dit_jax.training.sharding import MESH_AXES, PRESETS, partition_spec

TINY = MMDiT(
    input_size=(4, 6), in_channels=4, hidden_size=32, depth=3, num_heads=2, qk_norm=True, dual_blocks=1,
    positions_side=8, positions_base=4,
)  # fmt: skip


def given(model, batch=2, tokens=3, channels=12, pooled=10, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, *model.latent_size, model.in_channels)).astype(np.float32)
    text = {"context": (batch, tokens, channels), "pooled": (batch, pooled)}
    text = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in text.items()}
    return x, np.full(batch, 500.0, np.float32), text


@pytest.fixture(scope="module")
def first():
    """The parameters that training begins with."""
    return jax.jit(TINY.init)(jax.random.key(0), *given(TINY))["params"]


@pytest.fixture(scope="module")
def params(first):
    """Random ones: the first leave every branch out."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32), first)


def shapes(name):
    model = MMDiT.named(name, input_size=32)
    x = jax.ShapeDtypeStruct((1, 32, 32, 16), np.float32)
    text = {"context": jax.ShapeDtypeStruct((1, 77, 4096), np.float32),
            "pooled": jax.ShapeDtypeStruct((1, 2048), np.float32)}  # fmt: skip
    return jax.eval_shape(
        model.plain().init, jax.random.key(0), x, jax.ShapeDtypeStruct((1,), np.float32), text
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [("SD3-medium", 2_028_328_000), ("SD3.5-medium", 2_243_171_520), ("SD3.5-large", 8_056_627_520)],
)
def test_published_sizes_have_their_parameters(name, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(name))) == count


def test_another_name_is_refused():
    with pytest.raises(ConfigError, match=r"'SD4'; expected SD3-medium, SD3\.5-medium, SD3\.5-large or"):
        MMDiT.named("SD4")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MMDIT_SIZES)
def test_every_parameter_has_a_place_on_the_mesh(name, preset):
    mesh = AbstractMesh((2, 4, 2), MESH_AXES)
    split = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(name)["params"]):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        for rules in PRESETS[preset]:
            spec = partition_spec(path, leaf.shape, rules, mesh, where_it_fits=preset == "zero1")
            split += leaf.size * any(spec)
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes(name)))
    least = {"replicated": 0.0, "zero1": 0.99}.get(preset, 1.98)  # of the parameters and of the rest
    assert least * total <= split <= 2 * total and (preset != "replicated" or split == 0)


def test_at_first_the_output_is_zero(first):
    np.testing.assert_array_equal(jax.jit(TINY.apply)({"params": first}, *given(TINY)), 0)


def test_text_time_and_neighbours_matter(params):
    x, t, text = given(TINY)
    out = jax.jit(lambda *a: TINY.apply({"params": params}, *a))
    first = np.asarray(out(x, t, text))
    changes = {
        "context": (x, t, text | {"context": text["context"][:, ::-1] * 1.1}),
        "pooled": (x, t, text | {"pooled": -text["pooled"]}),
        "time": (x, t / 2, text),
    }
    for name, changed in changes.items():
        assert np.abs(out(*changed) - first).max() > 1e-3, name
    # The text has no positions: its tokens' order says nothing.
    np.testing.assert_allclose(out(x, t, text | {"context": text["context"][:, ::-1]}), first, atol=1e-5)
    moved = x.copy()
    moved[0, 0, 0] += 1
    assert (
        np.abs(out(moved, t, text) - first)[0, -1, -1].max() > 1e-4
    )  # attention carries it over the picture
    np.testing.assert_array_equal(out(moved, t, text)[1], first[1])  # and not into another sample


@pytest.mark.parametrize("options", [
    {"remat": "full"}, {"unroll": True}, {"attention": "xla"}, {"attention": "tokens_last"},
    {"attention": "tokens_last_by_head", "remat": "dots_attention"},
], ids=str)  # fmt: skip
def test_gradients_do_not_depend_on_how_it_is_computed(params, options):
    def loss(model, p):
        return jnp.mean(jnp.square(model.apply({"params": p}, *given(TINY))))

    expected = jax.jit(jax.grad(functools.partial(loss, TINY)))(params)
    found = jax.jit(jax.grad(functools.partial(loss, TINY.computed(**options))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), found, expected)
    idle = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(expected)
        if not np.abs(leaf).max() > 0
    }
    # The last block's text asks nothing: it is only attended to.
    assert idle == {"last_blocks/attn/context_norm/q/scale"}


def test_it_has_forward_derivatives(params):
    x, t, text = given(TINY)
    network = jax.jit(lambda t: TINY.plain().apply({"params": params}, x, t, text))
    _, slope = jax.jvp(network, (t,), (np.ones_like(t),))
    difference = np.asarray(network(t + 0.1) - network(t - 0.1)) / 0.2
    np.testing.assert_allclose(slope, difference, atol=0.02 * np.abs(difference).max())


def test_positions_are_the_middle_of_a_table():
    table = cropped_positions(8, 8, 16, 8, 4).reshape(8, 8, 16)
    np.testing.assert_array_equal(cropped_positions(4, 5, 16, 8, 4).reshape(4, 5, 16), table[2:6, 1:6])
    np.testing.assert_array_equal(cropped_positions(3, 3, 16, 3, 3), sincos_positions(3, 3, 16))


def test_a_picture_larger_than_the_table_is_refused():
    model = TINY.clone(input_size=(4, 18))
    with pytest.raises(ConfigError, match=r"has \(2, 9\) patches; expected at most positions_side, 8"):
        model.init(jax.random.key(0), *given(model))
