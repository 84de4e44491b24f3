"""Bits per dimension of latents that a run has not seen; the density itself is tested in tests/samplers."""

import dataclasses
import re
import tarfile

import pytest

from dit_jax.commands import evaluate
from dit_jax.config import ConfigError, TextConfig, resolve
from dit_jax.evaluation import likelihood


@pytest.fixture(scope="module")
def folder(data_dir, tmp_path_factory):
    """run/ of an untrained network on the digits' latents, and its dataset data/."""
    folder = tmp_path_factory.mktemp("run")
    with tarfile.open(data_dir / "earlier_version.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def bits_of(text):
    return float(
        re.match(r"(\d+\.\d+) bits per dimension of 8 latents \(8x8x4\), standard error 0\.\d+,", text)[1]
    )


def test_bits_do_not_depend_on_the_batch_and_are_those_of_no_absurd_network(folder, capsys):
    found = [
        bits_of(likelihood.report(str(folder / "run"), str(folder / "data"), 8, 20, batch_size=size))
        for size in (8, 3)
    ]
    assert found[0] == pytest.approx(found[1], abs=2e-3)
    assert 0.5 < found[0] < 20  # a normal of unit variance: 2.05
    arguments = [
        "--likelihood",
        "--workdir",
        folder / "run",
        "--data",
        folder / "data",
        "--count",
        8,
        "--steps",
        20,
    ]
    assert evaluate.main("evaluate.py", [*map(str, arguments), "--batch-size", "8"]) == 0
    assert bits_of(capsys.readouterr().out) == pytest.approx(found[0], abs=2e-4)


def test_of_a_run_on_the_digits_their_test_split_is_measured(folder, monkeypatch):
    run, of_run = str(folder / "run"), likelihood.run_config
    assert 0.5 < bits_of(likelihood.report(run, None, 8, 20, batch_size=8)) < 20

    def on_others(**data):
        def config(*args):
            found = of_run(*args)
            return dataclasses.replace(found, data=dataclasses.replace(found.data, **data))

        return config

    monkeypatch.setattr(likelihood, "run_config", on_others(mixture=(("a", 1.0), ("b", 1.0))))
    assert " 8 latents of the digits' test split (" in likelihood.report(run, None, 8, 20, batch_size=8)
    monkeypatch.setattr(likelihood, "run_config", on_others(source=""))
    with pytest.raises(ConfigError, match=r"--data is missing and the run's --data.source is ''; expected"):
        likelihood.report(run, None, 8, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "--count is 1; expected 2 to"),
        ({"steps": 0}, "--steps is 0; expected 2 to"),
        ({"workdir": "nowhere"}, "--workdir is nowhere, which has no config.json"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, options, message):
    given = {"workdir": str(folder / "run"), "data": str(folder / "data"), "count": 8, "steps": 20} | options
    with pytest.raises(ConfigError, match=message):
        likelihood.report(**given)


def test_a_run_of_captions_asks_for_them(folder, monkeypatch):
    of_run = likelihood.run_config

    def on_captions(*args):
        return resolve(dataclasses.replace(of_run(*args), text=TextConfig("bytes")))

    monkeypatch.setattr(likelihood, "run_config", on_captions)
    with pytest.raises(ConfigError, match=r"--data .* has no captions; --text.encoder says bytes"):
        likelihood.report(str(folder / "run"), str(folder / "data"), 8, 20)
