"""Captions: their arrays and null, what training leaves out of them, and the options that say so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.conditions import LabelCondition, TextCondition, byte_tokens, condition_of
from dit_jax.config import (
    Config,
    ConfigError,
    FlowMatchingConfig,
    MMDiTConfig,
    ModelConfig,
    TextConfig,
    from_json,
    resolve,
    to_json,
)
from dit_jax.models.cost import parameter_count
from dit_jax.models.create import build_model
from dit_jax.models.mmdit import MMDiT
from dit_jax.planning.flops import table

BYTES = TextCondition("bytes", 8, dropout=0.25)
SD3 = TextCondition("sd3", 80, 12, 7, clip_widths=(3, 4), encoder_dropout=0.5)


def sd3_captions(n):
    rng = np.random.default_rng(0)
    arrays = {"context": rng.uniform(1, 2, (n, 80, 12)), "pooled": rng.uniform(1, 2, (n, 7))}
    return {name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()} | {
        "mask": jnp.ones((n, 80), bool)
    }


def test_bytes_of_a_caption():
    found = byte_tokens(["", "ab", "a seven", "äöü!"], 6)
    assert found.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 99, 100, 0, 0, 0],
        [1, 99, 34, 117, 103, 120],
        [1, 197, 166, 197, 184, 0],  # not half a letter
    ]
    assert BYTES.fits({"tokens": byte_tokens(["a", ""], 8)}).all()
    assert not BYTES.fits({"tokens": np.zeros((1, 8), np.int32)}).any()
    np.testing.assert_array_equal(byte_tokens([""], 8)[0], BYTES.null["tokens"])


@pytest.mark.parametrize("kind", [BYTES, SD3], ids=["bytes", "sd3"])
def test_shapes_are_those_of_every_array_it_makes(kind):
    shapes = kind.shapes(3)
    for made in (kind.empty(3), kind.in_turn(3)):
        assert made.keys() == shapes.keys() == kind.fields.keys()
        assert all(made[name].shape == shape.shape for name, shape in shapes.items())
        assert all(made[name].dtype == shape.dtype for name, shape in shapes.items())
    assert kind.has_null


def test_a_share_of_captions_is_left_out():
    captions = {"tokens": jnp.asarray(byte_tokens(["seven"] * 400, 8))}
    dropped = np.asarray(BYTES.drop(jax.random.key(0), captions)["tokens"])
    null = (dropped == BYTES.null["tokens"]).all(axis=1)
    assert 60 < null.sum() < 140
    np.testing.assert_array_equal(dropped[~null], captions["tokens"][~null])


def test_each_encoder_is_left_out_on_its_own():
    """CLIP-L has 3 channels of the first 77 tokens and of the pooled text, CLIP-G the others, T5 the other tokens."""
    captions = sd3_captions(300)
    found = jax.tree.map(np.asarray, SD3.drop(jax.random.key(1), captions))
    gone = {}
    for name, context, pooled in (
        ("l", np.s_[:, :77, :3], np.s_[:, :3]), ("g", np.s_[:, :77, 3:], np.s_[:, 3:]), ("t5", np.s_[:, 77:], None),
    ):  # fmt: skip
        part = found["context"][context].reshape(300, -1)
        gone[name] = (part == 0).all(axis=1)
        np.testing.assert_array_equal(
            part[~gone[name]], np.asarray(captions["context"][context]).reshape(300, -1)[~gone[name]]
        )
        if pooled is not None:
            np.testing.assert_array_equal((found["pooled"][pooled] == 0).all(axis=1), gone[name])
        assert 110 < gone[name].sum() < 190
    assert 20 < (gone["l"] & gone["g"] & gone["t5"]).sum() < 60
    assert found["mask"].all()


def test_what_a_dataset_must_hold():
    BYTES.check_data(TextCondition("bytes", 8), "the set")
    with pytest.raises(ConfigError, match=r"the set has no captions; --text.encoder says bytes"):
        BYTES.check_data(LabelCondition(4), "the set")
    with pytest.raises(ConfigError, match=r"the set has captions with length 80; --text.length says 77"):
        dataclasses.replace(SD3, length=77).check_data(SD3, "the set")


def mmdit(name="MMDiT-2", text="bytes", **options):
    return Config(
        model=MMDiTConfig(name, **options), text=TextConfig(encoder=text), diffusion=FlowMatchingConfig()
    )


@pytest.mark.parametrize("name", ["SD3-medium", "SD3.5-medium", "SD3.5-large"])
def test_published_networks_by_the_config(name):
    config = resolve(mmdit(name, "sd3", input_size=(128, 128)))
    assert resolve(from_json(to_json(config))) == config
    assert parameter_count(config) == {
        "SD3-medium": 2_028_328_000, "SD3.5-medium": 2_243_171_520, "SD3.5-large": 8_056_627_520
    }[name]  # fmt: skip
    model = build_model(config)
    assert isinstance(model, MMDiT) and model.condition.fields.keys() == {"context", "mask", "pooled"}
    assert (model.text.length, model.text.channels, model.text.pooled) == (333, 4096, 2048)
    assert name in table([config], 1, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mmdit(text=""), "--text.encoder is empty; expected bytes, sd3 or a language model"),
        (mmdit("SD4"), r"--model.name is 'SD4'; expected SD3-medium, .*, such as MMDiT-12"),
        (mmdit("MMDiT-0"), r"--model.depth is 0; expected a number above 0"),
        (mmdit(dual_blocks=2), "--model.dual-blocks is 2; expected 0 to 1"),
        (mmdit(input_size=(512, 8)), r"--model.input-size is \(512, 8\); expected at most --model.positions-side"),
        (mmdit(text="a/b"), "--text.channels is 0; expected the channels of a/b's hidden states"),
        (Config(text=TextConfig("bytes", length=1)), "--text.length is 1; expected 2 to"),
        (Config(text=TextConfig("sd3", length=76)), "--text.length is 76; expected 77 to"),
        (Config(text=TextConfig("bytes", encoder_dropout=0.4)), "--text.encoder-dropout is 0.4; expected 0, or"),
        (Config(text=TextConfig("sd3", clip_widths=(4000, 97))), r"--text.clip-widths is \(4000, 97\); expected"),
        (Config(text=TextConfig("bytes", dropout=1.0)), "--text.dropout is 1.0; expected at least 0 and below 1"),
        (dataclasses.replace(mmdit(), diffusion=FlowMatchingConfig(learn_sigma=True)), "--diffusion.learn-sigma is"),
    ],
)  # fmt: skip
def test_what_is_no_config_of_captions_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        resolve(config)


def test_labels_are_what_a_config_without_an_encoder_means():
    config = resolve(Config(model=ModelConfig("DiT-S/2", num_classes=7)))
    assert condition_of(config) == LabelCondition(7, 0.1)
    asked = resolve(dataclasses.replace(config, text=TextConfig("bytes")))
    assert condition_of(asked) == TextCondition("bytes", 64, 0, 0, 0.1)
    assert build_model(asked).condition == condition_of(asked)
