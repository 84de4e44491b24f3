"""evaluate.py --workdir: the metrics of pictures that are never gathered are those of the pictures."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dit_jax.commands import evaluate
from dit_jax.config import ConfigError
from dit_jax.data.metadata import load_metadata
from dit_jax.evaluation.report import evaluate_file
from dit_jax.generation import command, scoring
from dit_jax.generation.command import SampleArgs
from dit_jax.generation.parts import Parts
from dit_jax.generation.scoring import ScoreArgs

HOW = {"num_samples": 44, "steps": 2, "batch_size": 16, "label_order": "random", "seed": 2}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Statistics of references are kept: here in a folder of this file's tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "scoring-cache"))
    monkeypatch.delenv("DIT_JAX_INCEPTION", raising=False)


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the run, in which results are written."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def score(run, **options):
    return scoring.main(ScoreArgs(workdir=str(run), **HOW | options))


class Killed(Exception):
    """Stands for whatever ends a process."""


def kill_at(monkeypatch, count):
    """Parts end the process when so many have been put."""
    put, kept = Parts.put, []

    def until(self, start, arrays):
        if len(kept) == count:
            raise Killed
        kept.append((self.folder.name, start))
        put(self, start, arrays)

    monkeypatch.setattr(Parts, "put", until)
    return kept


def test_metrics_are_those_of_the_same_pictures_in_a_file(run, tmp_path):
    assert command.main(SampleArgs(workdir=str(run), npz=str(tmp_path / "s.npz"), **HOW)) == 0
    expected = evaluate_file(str(tmp_path / "s.npz"), "digits")
    found = score(run)[0]
    assert found.metrics.keys() >= {"fid", "precision", "recall", "kid", "agreement"}
    for name, value in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-9), name
    assert dataclasses.replace(found, metrics=expected.metrics) == expected  # provenance as well
    lines = (run / scoring.FILE).read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [2, 2]  # the file's, the run's
    assert not (run / scoring.FOLDER).exists()


def test_an_autoencoder_that_has_moved_is_also_that_of_a_reference_it_made(latents, monkeypatch):
    seen = []
    monkeypatch.setattr(scoring, "load_reference", lambda *args: seen.append(args[-1]))
    metadata = dataclasses.replace(load_metadata(latents), image_size=32)
    for of_run in (metadata, dataclasses.replace(metadata, vae_hash="0" * 64)):
        scoring.open_ruler("--reference", str(latents), of_run, features="digits", vae="moved")
    assert seen == ["moved", None]


def test_what_another_command_draws_stays(tmp_path):
    for scale in ("1.5", "2"):
        (tmp_path / scoring.FOLDER / scale).mkdir(parents=True)
    scoring._drop_parts(tmp_path, [1.5])
    assert [path.name for path in (tmp_path / scoring.FOLDER).iterdir()] == ["2"]


def test_scales_are_a_curve_and_a_killed_sweep_goes_on(run, monkeypatch):
    whole = score(run, cfg_scale=[2.0, 1.0])
    assert [found.provenance.guidance["scale"] for found in whole] == [1.0, 2.0]
    assert whole[0].metrics["fid"] != whole[1].metrics["fid"]
    with Image.open(run / "guidance.png") as picture:
        colours = picture.convert("RGB").getcolors(2**24)
    assert len(colours) > 50  # lines and text, no empty canvas
    (run / "guidance.png").unlink()
    with monkeypatch.context() as patch:
        kept = kill_at(patch, 4)  # three of the first scale, one of the second
        with pytest.raises(Killed):
            score(run, cfg_scale=[1.0, 2.0])
    assert kept == [("1", 0), ("1", 16), ("1", 32), ("2", 0)]
    with pytest.raises(
        ConfigError, match=r"--workdir: .*evaluations\.parts/1 holds samples with seed 2, not 3"
    ):
        score(run, cfg_scale=[1.0, 2.0], seed=3)
    with monkeypatch.context() as patch:
        kept = kill_at(patch, 100)
        assert score(run, cfg_scale=[1.0, 2.0]) == whole
    assert kept == [("2", 16), ("2", 32)]
    assert (run / "guidance.png").exists() and not (run / scoring.FOLDER).exists()
    assert len((run / scoring.FILE).read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "--num-samples is 0; expected 1 to"),
        ({"cfg_scale": [1.5, 1.5]}, "--cfg-scale is 1.5 1.5; expected numbers, each once"),
        ({"cfg_scale": []}, "--cfg-scale is empty; expected numbers"),
        ({"cfg_scale": [1.0, float("nan")]}, "--cfg-scale is nan; expected a finite number"),
        ({"plot": "x.png"}, "--plot is x.png with one --cfg-scale; expected several"),
        ({"features": "inception"}, "DIT_JAX_INCEPTION"),
        ({"reference": "nowhere"}, "--inception is not given|--reference is nowhere"),
        ({"steps": 1}, "--steps is 1; expected 2 to"),
    ],
)
def test_bad_requests(run, options, message):
    with pytest.raises(ConfigError, match=message) as refused:
        score(run, **options)
    assert "\n" not in str(refused.value)


def test_a_run_on_other_data_needs_a_reference(run):
    file = run / "dataset.json"
    file.write_text(file.read_text().replace('"source": "digits/train"', '"source": "folder:cats"'))
    with pytest.raises(
        ConfigError, match="--reference is missing and the run's data are folder:cats; expected"
    ):
        score(run)


def test_which_options_draw(run, capsys):
    assert evaluate.main("evaluate.py", ["--workdir", str(run), "--steps", "1"]) == 2
    assert "--steps is 1; expected 2 to 100" in capsys.readouterr().err
    assert evaluate.main("evaluate.py", ["--workdir", str(run), "--npz", str(run / "none.npz")]) == 2
    assert "--npz names" in capsys.readouterr().err
    args = ["--workdir", str(run), "--num-samples", "20", "--steps", "2", "--cfg-scale", "1", "1.5"]
    assert evaluate.main("evaluate.py", args) == 0
    out = capsys.readouterr().out
    assert out.count("20 samples against 1,433 pictures of digits/train") == 2
    assert "guidance 1.0:" in out and "guidance 1.5:" in out and np.char.count(out, "FID") >= 2
