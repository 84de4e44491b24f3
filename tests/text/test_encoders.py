"""Encoders of captions against diffusers and transformers themselves, and what is refused of their files."""

import json
import shutil

import numpy as np
import pytest

from dit_jax.config import ConfigError
from dit_jax.text.encoders import open_encoder

CAPTIONS = ["a cat", "", "seven dogs, left of a three"]
T5_LENGTH = 32


@pytest.fixture(scope="module")
def encoder(sd3_folder):
    return open_encoder("sd3", 77 + T5_LENGTH, str(sd3_folder))


@pytest.fixture
def copied(sd3_folder, tmp_path):
    """A copy of the pipeline's encoders to be damaged."""
    shutil.copytree(sd3_folder, tmp_path / "sd3", ignore=shutil.ignore_patterns("transformer", "vae"))
    return tmp_path / "sd3"


# --------------------------------------------------------------------------------- Stable Diffusion 3


def test_sd3_is_what_diffusers_encodes(encoder, sd3_pipeline, peers):
    torch, _ = peers
    with torch.no_grad():
        tokens, _, pooled, _ = sd3_pipeline.encode_prompt(CAPTIONS, None, None, max_sequence_length=T5_LENGTH)
    found = encoder.encode(CAPTIONS)
    np.testing.assert_allclose(np.stack([one.tokens for one in found]), tokens.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.stack([one.pooled for one in found]), pooled.numpy(), rtol=1e-5, atol=1e-5)
    assert (encoder.channels, encoder.pooled, encoder.length) == (48, 40, 109) and encoder.clip_widths == (
        16,
        24,
    )
    assert not any(one.cut for one in found) and found[0].tokens.dtype == np.float32


def test_more_captions_than_a_batch_stay_in_order(encoder):
    captions = [f"caption {i}" for i in range(19)]
    found = encoder.encode(captions)
    for i in (0, 8, 18):
        np.testing.assert_allclose(found[i].tokens, encoder.encode([captions[i]])[0].tokens, atol=1e-4)


def test_without_t5_there_are_zeros(copied, encoder):
    shutil.rmtree(copied / "text_encoder_3")
    without = open_encoder("sd3", 77 + T5_LENGTH, str(copied), channels=64)
    found = without.encode(CAPTIONS[:1])[0].tokens
    assert found.shape == (109, 64) and not found[77:].any() and not found[:, 40:].any()
    np.testing.assert_array_equal(found[:77, :40], encoder.encode(CAPTIONS[:1])[0].tokens[:77, :40])
    assert without.fingerprint != encoder.fingerprint


def test_clip_alone_reads_77_tokens(sd3_folder, encoder):
    alone = open_encoder("sd3", 77, str(sd3_folder)).encode(CAPTIONS[:1])[0].tokens
    np.testing.assert_allclose(alone, encoder.encode(CAPTIONS[:1])[0].tokens[:77], atol=1e-5)


def test_a_long_caption_is_cut_and_said_to_be(encoder):
    short, long = encoder.encode(["x", "x" * 10_000])
    assert long.tokens.shape == short.tokens.shape and short.cut == ""
    assert long.cut == "CLIP reads 77 of 10002 tokens, T5 reads 32 of 10002 tokens"


def test_the_fingerprint_is_of_the_weights(copied, encoder):
    again = open_encoder("sd3", 77, str(copied))
    assert len(again.fingerprint) == 64 and again.fingerprint == encoder.fingerprint
    file = copied / "text_encoder_2" / "model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    assert open_encoder("sd3", 77, str(copied)).fingerprint != again.fingerprint


# ------------------------------------------------------------------------------------ language models


def language_model(folder, kind):
    """A small random model of a kind with its tokenizer, written as transformers does; the model."""
    import tokenizers
    import torch
    import transformers

    letters = ["<pad>", "<end>", "<unk>", *(chr(i) for i in range(32, 127))]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    names = {"unk_token": "<unk>", "eos_token": "<end>"} | ({} if kind == "qwen3" else {"pad_token": "<pad>"})
    sizes = dict(vocab_size=len(letters), hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    torch.manual_seed(0)
    if kind == "qwen3":
        config = transformers.Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        model = transformers.Qwen3ForCausalLM(config)  # as published: with a head that is not asked for
    elif kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=4))
    else:
        config = transformers.T5Config(
            vocab_size=len(letters),
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
        model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["qwen3", "bert", "t5"])
def test_last_hidden_states_of_a_language_model(tmp_path, peers, kind):
    """Each caption by itself, without padding or mask, is what its row of the batch is."""
    torch, _ = peers
    model = language_model(tmp_path / "lm", kind)
    core = {"qwen3": "model", "bert": None, "t5": "encoder"}[kind]
    core = getattr(model, core) if core else model
    encoder = open_encoder(str(tmp_path / "lm"), 24, channels=32)
    assert (encoder.channels, encoder.pooled, encoder.clip_widths) == (32, 0, (0, 0))
    for caption, found in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        assert found.tokens.shape == (min(len(caption), 24), 32) and found.pooled is None
        assert found.cut == ("it reads 24 of 27 tokens" if len(caption) > 24 else "")
        if caption:
            ids = torch.tensor([[ord(letter) - 32 + 3 for letter in caption[:24]]])
            with torch.no_grad():
                expected = core(ids).last_hidden_state[0].numpy()
            np.testing.assert_allclose(found.tokens, expected, rtol=1e-4, atol=1e-5)
    assert encoder.encode([""])[0].tokens.shape == (0, 32)


# --------------------------------------------------------------------------------- what is refused


def refused(*args, **how):
    with pytest.raises(ConfigError) as error:
        open_encoder(*args, **how)
    said = str(error.value)
    assert len(said) < 600 and "\n" not in said
    return said


def test_what_is_not_there_is_named(copied, tmp_path):
    assert "is not there" in refused("sd3", 77, str(tmp_path / "nothing"))
    assert "hub" in refused("nobody/has-this-model", 77)
    shutil.rmtree(copied / "text_encoder_2")
    assert "has no text_encoder_2" in refused("sd3", 77, str(copied))
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in refused(str(tmp_path / "empty"), 8)


def test_wrong_numbers_are_refused(sd3_folder):
    assert "at least 77" in refused("sd3", 76, str(sd3_folder))
    assert "gives 48 channels; expected 4096" in refused("sd3", 77, str(sd3_folder), channels=4096)
    assert "part of the network" in refused("bytes", 64)


def test_a_cut_or_missing_shard_is_refused(copied):
    folder = copied / "text_encoder_3"
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "text_encoder_3 cannot be read" in refused("sd3", 109, str(copied))
    file.unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes(whole)
    assert "has no model-00002-of-00002.safetensors" in refused("sd3", 109, str(copied))


def test_without_transformers_the_extra_is_named(monkeypatch, sd3_folder):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else name)
    assert "pip install 'dit_jax[text]'" in refused("sd3", 77, str(sd3_folder))
