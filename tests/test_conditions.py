"""What a kind of condition says of itself, and those who hand a condition on knowing nothing but its tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.conditions import Field, LabelCondition, label_numbers
from dit_jax.config import ConfigError
from dit_jax.data.records import parse, serialize
from dit_jax.diffusion.guidance import classifier_free_guidance
from dit_jax.generation.sampling import samples_of
from dit_jax.interop.imagenet import class_names
from dit_jax.models.create import build_model, init_params

KIND = LabelCondition(4, 0.25)


def test_shapes_are_those_of_every_array_it_makes():
    shapes = KIND.shapes(6)
    for made in (
        KIND.empty(6),
        KIND.in_turn(6),
        KIND.on_host([0, 1, 2, 3, 0, 1]),
        KIND.tree(jnp.zeros(6, "int32")),
    ):
        assert made.keys() == shapes.keys() == KIND.fields.keys()
        assert all(made[name].shape == shape.shape for name, shape in shapes.items())
        assert all(made[name].dtype == shape.dtype for name, shape in shapes.items())
        assert samples_of(made) == 6
    np.testing.assert_array_equal(KIND.in_turn(6)["label"], [0, 1, 2, 3, 0, 1])
    assert KIND.of({"moments": 0, "label": 1}) == {"label": 1}


def test_dropping_puts_the_null():
    condition = KIND.in_turn(400)
    dropped = np.asarray(KIND.drop(jax.random.key(0), condition)["label"])
    null = dropped == KIND.null["label"]
    assert 60 < null.sum() < 140
    np.testing.assert_array_equal(dropped[~null], condition["label"][~null])
    assert KIND.has_null and not LabelCondition(4).has_null and not LabelCondition(0, 0.5).has_null


def test_what_is_no_class_is_refused():
    np.testing.assert_array_equal(KIND.fits({"label": np.array([-1, 0, 3, 4])}), [False, True, True, False])
    KIND.check(KIND.in_turn(9))
    with pytest.raises(ConfigError, match="--labels names class 4; expected 0 to 3"):
        KIND.check({"label": np.array([0, 4])})
    KIND.check_data(LabelCondition(4), "the set")
    LabelCondition(0).check_data(LabelCondition(7), "the set")
    with pytest.raises(ConfigError, match=r"the set has 7 classes; --model.num-classes says 4"):
        KIND.check_data(LabelCondition(7), "the set")


def test_the_network_takes_labels_or_their_tree(tiny):
    config = tiny.config()
    model = build_model(config)
    assert model.condition == LabelCondition(4, config.model.class_dropout_prob)
    params = jax.jit(lambda key: init_params(model, config, key))(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.02, params)  # its last layer is zero
    x, t, y = jnp.ones((2, 8, 8, 4)), jnp.asarray([3, 50]), jnp.asarray([1, 3])
    network = jax.jit(lambda c: model.apply({"params": params}, x, t, c))
    plain, tree = network(y), network({"label": y})
    np.testing.assert_array_equal(plain, tree)
    assert np.ptp(np.asarray(plain - network({"label": y * 0}))) > 0


def test_guidance_takes_any_tree():
    """Two arrays with a null each, one of them a vector."""
    rng = np.random.default_rng(0)
    x, text = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 2, 2, 4), (3, 5)))
    condition = {"label": jnp.asarray([1, 2, 3]), "text": text}
    null = {"label": 9, "text": np.arange(5.0)}

    def network(x, t, c):
        told = c["label"] + c["text"] @ jnp.arange(1.0, 6.0)
        return x * t.reshape(-1, 1, 1, 1) + told.reshape(-1, 1, 1, 1)

    t = jnp.asarray([1.0, 2.0, 3.0])
    nulls = {"label": jnp.full(3, 9), "text": jnp.tile(jnp.arange(5.0), (3, 1))}
    with_it, without = network(x, t, condition), network(x, t, nulls)
    found = classifier_free_guidance(network, condition, null, 2.5)(x, t)
    np.testing.assert_allclose(found, without + 2.5 * (with_it - without), rtol=1e-5)
    np.testing.assert_array_equal(classifier_free_guidance(network, condition, null, 1.0)(x, t), with_it)
    with pytest.raises(ValueError, match="expected"):
        classifier_free_guidance(network, condition | {"text": text[:2]}, null, 2.0)


def test_a_record_holds_every_field():
    fields = LabelCondition.fields | {"tokens": Field((2, 3))}
    tokens = np.arange(6).reshape(2, 3) + 2**33
    moments = np.zeros((1, 2, 2, 4), np.float16)
    name, condition, data = parse(serialize("a", {"label": 7, "tokens": tokens}, moments), fields)
    assert (name, condition["label"], data) == (b"a", 7, moments.tobytes())
    np.testing.assert_array_equal(condition["tokens"], tokens)


def test_imagenets_names_and_their_synonyms():
    names = class_names()
    assert len(names) == 1000
    for label, number in {
        "tench": 0, "Tinca tinca": 0, "tench, Tinca tinca": 0, "golden retriever": 207, "white shark": 2,
        "umbrella": 879, "maillot, tank suit": 639, "toilet tissue": 999, "number:134": 134, "517": 517,
    }.items():  # fmt: skip
        assert label_numbers([label], names, 1000).tolist() == [number], label
    for label, numbers in {"crane": (134, 517), "maillot": (638, 639)}.items():
        with pytest.raises(ConfigError, match=rf"'{label}', which may be class {numbers[0]} or {numbers[1]}"):
            label_numbers([label], names, 1000)
    with pytest.raises(ConfigError, match=r"'dog'; expected a class number or one of: tench, Tinca tinca, "):
        label_numbers(["dog"], names, 1000)
