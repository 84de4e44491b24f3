"""Runs that are measured while they train: the same figures each time, and the same training."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.conditions import byte_tokens
from dit_jax.config import ConfigError, TextConfig, from_json, resolve, to_json
from dit_jax.data.latents import LatentDataset
from dit_jax.evaluation.features import FeatureExtractor
from dit_jax.generation import decoding, scoring, watching
from dit_jax.runs.log import read_lines
from dit_jax.training import loop
from dit_jax.training.loop import train

MEASURED = {"evaluate_every": 2, "evaluate_count": 20, "sample_steps": 2}


@pytest.fixture
def config(tiny, latents, tmp_path, monkeypatch):
    """A function that makes the config of a run whose pictures are its latents, measured in four features of them."""

    def pictures(latents):
        return (jnp.clip(latents, -1, 1) * 127 + 128).astype("uint8")

    for module in (watching, decoding):
        monkeypatch.setattr(module, "load_decoder", lambda *_: pictures)

    def run(images):
        return {
            "pool": images.mean(axis=(1, 2)).astype(np.float32),
            "read": images[:, 0, 0, 0].astype(np.int32) % 4,
        }

    extractor = FeatureExtractor("digits", "none", None, run)
    monkeypatch.setattr(scoring, "choose_extractor", lambda *_: extractor)
    monkeypatch.setattr(FeatureExtractor, "__call__", lambda self, images: self.run(images))
    np.savez(tmp_path / "reference.npz", mu=np.full(4, 128.0), sigma=np.eye(4))

    def make(name="run", mesh=None, **options):
        where = {"workdir": str(tmp_path / name), "evaluate_reference": str(tmp_path / "reference.npz")}
        return tiny.config(train=where | options, data={"dir": str(latents)}, mesh=mesh or {})

    return make


def lines_of(run, *names):
    """(step, value of each name) of the lines that have them all."""
    lines = read_lines(pathlib.Path(run.train.workdir) / "metrics.jsonl")
    return [(line["step"], *(line[name] for name in names)) for line in lines if set(names) <= line.keys()]


@pytest.mark.slow
def test_measuring_changes_nothing_and_comes_out_the_same_in_a_resumed_run(config, tmp_path):
    plain, whole = config("plain", steps=4), config("whole", steps=4, **MEASURED)
    train(plain)
    train(whole)
    train(config("parts", steps=2, **MEASURED))
    train(config("parts", steps=4, **MEASURED))
    losses = lines_of(plain, "loss", "grad_norm")
    assert len(losses) == 2 and losses == lines_of(whole, "loss", "grad_norm")
    found = lines_of(whole, "frechet", "agreement")
    assert [step for step, *_ in found] == [2, 4] and found[0][1] != found[1][1]
    assert found == lines_of(config("parts"), "frechet", "agreement")
    assert not (tmp_path / "whole" / watching.FOLDER).exists()
    events = b"".join(file.read_bytes() for file in (tmp_path / "whole" / "tensorboard").iterdir())
    assert events.count(b"frechet") == 2


@pytest.mark.slow
def test_parameters_that_are_split_over_devices_are_measured_alike(config):
    one = config("one", steps=2, **MEASURED)
    split = config("split", {"preset": "fsdp", "data": 2, "fsdp": 4}, steps=2, **MEASURED)
    train(one)
    train(split)
    ((_, expected),), ((_, found),) = lines_of(one, "frechet"), lines_of(split, "frechet")
    assert found == pytest.approx(expected, rel=2e-2)


def test_a_measurement_that_fails_does_not_end_a_run(config, monkeypatch, capsys):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(watching, "draw", fail)
    assert int(train(config(steps=2, **MEASURED)).step) == 2
    assert "no evaluation at step 2: no space left" in "".join(capsys.readouterr())


def test_a_run_that_cannot_be_measured_is_refused_before_it_starts(tiny, latents, tmp_path, monkeypatch):
    def make(**options):
        train = {"workdir": str(tmp_path / "run"), **MEASURED} | options
        return tiny.config(train=train, data={"dir": str(latents)})

    with pytest.raises(
        ConfigError, match=r"--train.evaluate-every is 2, but the dataset's autoencoder cannot be"
    ):
        train(make())
    monkeypatch.setattr(decoding, "load_decoder", lambda *_: None)
    with pytest.raises(
        ConfigError, match=r"--train.evaluate-reference is missing and the run's data are random"
    ):
        train(make())
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(ConfigError, match=r"--train.evaluate-count is 1; expected at least 2"):
        make(evaluate_count=1)
    with pytest.raises(ConfigError, match=r"--train.sample-steps is 1; expected"):
        make(sample_steps=1)


def test_a_config_from_before_still_reads(tiny):
    saved = json.loads(to_json(tiny.config()))
    for name in ("evaluate_every", "evaluate_count", "evaluate_reference"):
        del saved["train"][name]
    assert from_json(json.dumps(saved)) == tiny.config()


def test_a_run_of_captions_is_measured_by_those_of_its_data(config, latents, tmp_path, monkeypatch):
    class Drawn(RuntimeError):
        pass

    def drawn(source, *_):
        raise Drawn(source.condition["tokens"].tolist())

    monkeypatch.setattr(watching, "draw", drawn)
    made = dataclasses.replace(config(steps=2, **MEASURED), text=TextConfig("bytes", length=8, dropout=0.0))
    monkeypatch.setattr(loop, "open_dataset", lambda _: Captioned(latents))
    monkeypatch.setattr(loop, "batches", Captioned.batches(loop.batches))
    with pytest.raises(Drawn) as found:
        train(resolve(made))
    assert str([[1] + [byte + 2 for byte in b"a"] + [0] * 6] * 20) in str(found.value)


class Captioned(LatentDataset):
    """The dataset, with the same caption for each record."""

    def examples(self, n):
        return {"tokens": byte_tokens(["a"] * n, 8)}, ["a"] * n

    @staticmethod
    def batches(batches):
        def told(*args):
            for batch in batches(*args):
                tokens = byte_tokens(["a"] * len(batch["label"]), 8)
                yield {"moments": batch["moments"], "tokens": jax.device_put(tokens, batch["label"].sharding)}

        return told
