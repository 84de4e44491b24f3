"""A run of an earlier version goes on and is sampled from as that version would have done.

tests/data/earlier_version.tar.xz was written by the code whose config.json had neither a version nor kinds, and named
under `model` how a network is computed: a recipe, a dataset, the folder of a run at step 4, and what that code then
gave for steps 5 to 8 of the same command and for samples of step 4.
"""

import json
import tarfile

import numpy as np
import pytest

from dit_jax.config import parse_args
from dit_jax.generation import command
from dit_jax.generation.command import SampleArgs, load_run
from dit_jax.training.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture
def earlier(data_dir, tmp_path):
    """(a folder with recipe.py, data/ and run/, what the earlier version gave)."""
    with tarfile.open(data_dir / "earlier_version.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path, json.loads((tmp_path / "expected.json").read_text())


def test_the_same_command_goes_on(earlier):
    folder, expected = earlier
    places = {name: str(folder / name) for name in ("recipe.py", "data", "run")}
    words = [places.get(word, word) for word in expected["command"]]
    config = parse_args([*words, "--train.steps", "8"])
    assert int(train(config).step) == 8
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines[4:]:
        for name, value in expected["losses"][str(line["step"])].items():
            assert line[name] == pytest.approx(value, rel=1e-6 if name == "loss" else 1e-5), (name, line)
    assert load_run(folder / "run").config == config


def test_its_samples_are_the_same(earlier, monkeypatch):
    folder, expected = earlier
    monkeypatch.setattr(command, "load_decoder", lambda *_: lambda latents: latents)
    options = expected["sampling"] | {"workdir": str(folder / "run"), "npz": str(folder / "samples.npz")}
    options["sampler"] = "ddim"  # the default then
    assert command.main(SampleArgs(**options)) == 0
    with np.load(folder / "latents.npz") as recorded, np.load(folder / "samples.npz") as found:
        np.testing.assert_allclose(found["arr_0"], recorded["latents"], rtol=1e-5, atol=1e-5)
