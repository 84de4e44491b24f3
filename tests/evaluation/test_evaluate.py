"""evaluate.py --reference: every kind of reference, what it cannot give, the result and where it goes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dit_jax.commands import evaluate as command
from dit_jax.config import ConfigError
from dit_jax.data.digits import load_digits, load_originals, to_8x8
from dit_jax.evaluation import inception, references
from dit_jax.evaluation.features import FeatureExtractor, features_of
from dit_jax.evaluation.frechet import frechet_distance
from dit_jax.evaluation.metrics import Evaluation, append_evaluation, evaluate
from dit_jax.evaluation.references import load_reference
from dit_jax.evaluation.report import evaluate_file
from dit_jax.evaluation.samples import Provenance, save_samples
from dit_jax.interop.diffusers import asset_path

PICTURES = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8)
SAMPLES = np.random.default_rng(1).integers(0, 200, (30, 12, 12, 3), np.uint8)


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    """What is kept lies in the test's own folder; no weights are named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", ".cache/jax")
    monkeypatch.delenv("DIT_JAX_INCEPTION", raising=False)


@pytest.fixture
def extractor():
    """An extractor of all features that counts the pictures it sees."""

    def run(images):
        run.seen += len(images)
        x = images.astype(np.float32) / 64
        return {
            "pool": x[:, :2, :2, 0].reshape(len(x), -1),
            "spatial": x[:, 5, :3, 1],
            "logits": x[:, 7, :6, 2],
        }

    run.seen = 0
    return FeatureExtractor("fake", "adm", "f" * 64, run)


def statistics(rows):
    return rows.mean(axis=0, dtype=np.float64), np.cov(rows.astype(np.float64), rowvar=False)


def adm_file(path, extractor, leave=(), pictures=PICTURES[:20]):
    """A file as the ADM evaluator's: statistics of all pictures, and some of these."""
    of = extractor.run(PICTURES)
    arrays = dict(
        zip(
            ("mu", "sigma", "mu_s", "sigma_s"),
            [*statistics(of["pool"]), *statistics(of["spatial"])],
            strict=True,
        )
    )
    np.savez(path, arr_0=pictures, **arrays)
    with np.load(path) as file:
        kept = {name: array for name, array in file.items() if name not in leave}
    np.savez(path, **kept)
    return str(path)


def test_a_file_of_the_evaluator_gives_every_metric(extractor, tmp_path):
    name = adm_file(tmp_path / "ref.npz", extractor)
    found = evaluate(features_of(extractor, SAMPLES), load_reference(name, extractor, 12), extractor)
    ours, theirs = extractor.run(SAMPLES), extractor.run(PICTURES)
    # Distances are to the statistics of all 40 pictures, the rest to the 20 that are in the file.
    assert found.metrics["fid"] == pytest.approx(frechet_distance(ours["pool"], theirs["pool"]), rel=1e-6)
    assert found.metrics["sfid"] == pytest.approx(
        frechet_distance(ours["spatial"], theirs["spatial"]), rel=1e-6
    )
    assert found.metrics["fid"] > 0.1 and found.metrics["sfid"] > 0.1
    a, b = ours["pool"].astype(float), theirs["pool"][:20].astype(float)
    inside = [
        ((x[:, None] - y[None]) ** 2).sum(-1) <= np.sort(((y[:, None] - y[None]) ** 2).sum(-1))[:, 3]
        for x, y in ((a, b), (b, a))
    ]
    assert [found.metrics[m] for m in ("precision", "recall")] == [x.any(axis=1).mean() for x in inside]
    assert found.left_out == {} and found.reference_count == 20 and found.count == 30
    assert found.settings["kid_subset_size"] == 20
    assert set(json.loads(found.to_json())["metrics"]) == set(found.metrics)


@pytest.mark.parametrize(
    ("leave", "left_out"),
    [
        (("arr_0",), {"precision": "no pictures", "recall": "no pictures", "kid": "no pictures"}),
        (("mu_s", "sigma_s"), {"sfid": "no mu_s and sigma_s"}),
        (("mu", "sigma"), {"fid": "no mu and sigma"}),
        (("mu", "sigma", "mu_s", "sigma_s"), {}),
        (("arr_0", "mu_s"), dict.fromkeys(("precision", "recall", "kid", "sfid"), "")),
    ],
)
def test_what_a_file_does_not_hold_is_left_out_and_named(extractor, tmp_path, leave, left_out):
    name = adm_file(tmp_path / "ref.npz", extractor, leave)
    found = evaluate(features_of(extractor, SAMPLES), load_reference(name, extractor, 12), extractor)
    assert found.left_out.keys() == left_out.keys()
    for metric, why in left_out.items():
        assert why in found.left_out[metric] and "ref.npz" in found.left_out[metric]
        assert metric not in found.metrics
    assert set(found.metrics) | set(found.left_out) >= {
        "fid",
        "sfid",
        "inception_score",
        "precision",
        "recall",
        "kid",
    }


def test_statistics_by_other_names(extractor, tmp_path):
    mean, covariance = statistics(extractor.run(PICTURES)["pool"])
    np.savez(tmp_path / "a.npz", ref_mu=mean, ref_sigma=covariance)
    np.savez(tmp_path / "b.npz", mu=mean, sigma=covariance)
    samples = features_of(extractor, SAMPLES)
    one, other = (
        evaluate(samples, load_reference(str(tmp_path / n), extractor, 12), extractor)
        for n in ("a.npz", "b.npz")
    )
    assert one.metrics == other.metrics and one.reference_count is None
    assert one.reference_hash != other.reference_hash


def test_pictures_give_the_same_as_a_folder_a_source_or_an_array_and_are_seen_once(
    extractor, tmp_path, capsys
):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(folder / f"{i:03}.png")
    np.savez(tmp_path / "source.npz", images=PICTURES)
    np.savez(tmp_path / "array.npz", arr_0=PICTURES)
    names = [str(folder), f"folder:{folder}", f"npz:{tmp_path / 'source.npz'}", str(tmp_path / "array.npz")]
    samples, results = features_of(extractor, SAMPLES), []
    for name in names:
        results.append(evaluate(samples, load_reference(name, extractor, 12), extractor))
        seen = extractor.run.seen
        again = evaluate(samples, load_reference(name, extractor, 12), extractor)
        assert extractor.run.seen == seen and again == results[-1]
        assert results[-1].metrics == pytest.approx(results[0].metrics, rel=1e-9)
        assert results[-1].reference_count == 40
    assert extractor.run.seen == 30 + 3 * 40  # a folder is one by both names
    Image.fromarray(PICTURES[0]).save(folder / "more.png")
    assert load_reference(names[0], extractor, 12).count == 41  # another set now
    other = FeatureExtractor("fake", "pytorch-fid", "f" * 64, extractor.run)
    seen = extractor.run.seen
    load_reference(names[0], other, 12)
    assert extractor.run.seen == seen + 41  # and other features
    for kept in (tmp_path / "cache" / "dit_jax" / "references").iterdir():
        kept.write_bytes(kept.read_bytes()[:1000])
    assert load_reference(names[0], extractor, 12).count == 41
    assert "cannot be read" in capsys.readouterr().err


def test_of_many_pictures_some_are_kept(extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(references, "KEPT", 7)
    monkeypatch.setattr(references, "BATCH", 16)
    np.savez(tmp_path / "array.npz", arr_0=PICTURES)
    found = load_reference(str(tmp_path / "array.npz"), extractor, 12)
    rows = extractor.run(PICTURES)["pool"]
    np.testing.assert_array_equal(found.pool, rows[[0, 6, 13, 19, 26, 32, 39]])
    np.testing.assert_allclose(found.gaussians["pool"][0], rows.mean(axis=0), rtol=1e-6)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A file of 'samples': the digits' test split, of a run."""
    folder = tmp_path_factory.mktemp("digits")
    run = folder / "run"
    run.mkdir()
    known = Provenance(str(run), 300, "ema", "ddim", 50, {"scale": 1.5}, 0, "float32")
    save_samples(folder / "samples.npz", *load_digits("test"), known)
    return folder


def test_digits_are_measured_by_their_referee_without_any_weights(digits, capsys):
    out = digits / "result.json"
    arguments = ["--npz", str(digits / "samples.npz"), "--reference", "digits", "--out", str(out)]
    assert command.main("evaluate.py", arguments) == 0
    said = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result == json.loads((digits / "run" / "evaluations.jsonl").read_text())
    pictures = [to_8x8(load_digits("test")[0]), load_originals("train")[0]]
    assert result["metrics"]["fid"] == pytest.approx(frechet_distance(*pictures), rel=1e-4)
    assert 15 < result["metrics"]["fid"] < 22
    assert result["metrics"]["agreement"] == pytest.approx(360 / 364)
    assert result["metrics"]["precision"] > 0.8 and result["metrics"]["recall"] > 0.6
    assert (
        result["features"] == "digits"
        and result["weights_hash"] is None
        and result["reference_count"] == 1433
    )
    assert (
        result["run"] == str(digits / "run")
        and result["step"] == 300
        and result["guidance"] == {"scale": 1.5}
    )
    assert set(result["left_out"]) == {"sfid", "inception_score"}
    assert "364 samples against 1,433 pictures of digits/train" in said and "98.9%" in said
    assert "left out: sFID" in said and "Frechet distance" in said and " FID" not in said
    arguments[-1] = str(digits / "again.json")
    assert command.main("evaluate.py", [*arguments, "--split", "test"]) == 0
    # Of the very same digits, but in 32x32 pixels, whose blocks are not quite those of 8x8.
    assert json.loads((digits / "again.json").read_text())["metrics"]["fid"] < 1
    assert len((digits / "run" / "evaluations.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_prepared_dataset_of_digits_is_decoded(digits, tmp_path):
    from dit_jax.data.encode import prepare
    from dit_jax.data.encoders import flax_encoder
    from dit_jax.data.sources import open_source

    prepare(
        open_source("digits", "test"), flax_encoder("digits"), tmp_path / "set", image_size=32, mirrors=False
    )
    found = evaluate_file(str(digits / "samples.npz"), str(tmp_path / "set"))
    assert (
        found.features == "digits"
        and found.reference == "digits/test decoded"
        and found.reference_count == 364
    )
    # The autoencoder's own error: real digits of the other split are above 15.
    assert 0 < found.metrics["fid"] < 10
    moved = tmp_path / "moved"
    shutil.copytree(asset_path("digits_vae"), moved)
    place = (str(digits / "samples.npz"), str(tmp_path / "set"))
    assert evaluate_file(*place, vae=str(moved)).metrics == found.metrics
    weights = moved / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(ConfigError, match=r"was encoded by weights \w+; .*moved has weights"):
        evaluate_file(*place, vae=str(moved))


@pytest.mark.slow
def test_pictures_of_any_kind_are_measured_with_the_weights(inception_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inception, "BATCH", 1)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "samples.npz", rng.integers(0, 256, (8, 40, 56, 3), np.uint8))  # without labels
    np.savez(tmp_path / "ref.npz", arr_0=rng.integers(0, 256, (8, 40, 56, 3), np.uint8))
    arguments = ["--npz", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "ref.npz")]
    assert (
        command.main(
            "evaluate.py", [*arguments, "--out", str(tmp_path / "r.json"), "--inception", str(inception_file)]
        )
        == 0
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["features"] == "inception" and result["convention"] == "adm" and result["run"] is None
    assert len(result["weights_hash"]) == 64 and result["left_out"] == {}
    assert all(np.isfinite(value) for value in result["metrics"].values()) and result["metrics"]["sfid"] > 0
    assert "inception features (adm, weights" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused_in_one_sentence(digits, extractor, tmp_path, capsys):
    samples = str(digits / "samples.npz")
    np.savez(tmp_path / "nothing.npz", other=np.zeros(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(64), sigma=np.zeros((3, 3)))
    np.savez(tmp_path / "dim.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((3, 32, 32, 3)))
    np.savez(tmp_path / "small.npz", arr_0=PICTURES)
    np.savez(tmp_path / "one.npz", arr_0=PICTURES[:1], arr_1=np.zeros(1, int))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "dim.npz").read_bytes()[:500])
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"no picture")
    by_digits = ["--features", "digits"]
    for reference, options, message in (
        ("nowhere", by_digits, "--reference is nowhere, where there is nothing; expected an .npz file"),
        ("nowhere", [], "--reference is nowhere, where there is nothing; expected an .npz file"),
        (tmp_path / "nothing.npz", by_digits, "nothing.npz, which has neither mu and sigma nor arr_0"),
        (
            tmp_path / "shape.npz",
            by_digits,
            r"shape.npz with mu (64,) and sigma (3, 3); expected (F,) and (F, F)",
        ),
        (tmp_path / "nan.npz", by_digits, "nan.npz, whose mu or sigma is not finite; expected numbers"),
        (tmp_path / "dim.npz", by_digits, "dim.npz is of 2048 features; the samples' are 64"),
        (tmp_path / "float.npz", by_digits, "float.npz with arr_0 (3, 32, 32, 3) float64; expected pictures"),
        (tmp_path / "small.npz", by_digits, "has pictures of 12x12 pixels; the digits features are of 32x32"),
        (tmp_path / "cut.npz", by_digits, "cut.npz, which cannot be read"),
        (folder, by_digits, "a.png cannot be decoded"),
        ("digits", ["--split", "val"], "--split is 'val'; expected train or test"),
        ("digits", ["--features", "inception"], "--inception is not given and $DIT_JAX_INCEPTION is not set"),
        (tmp_path / "small.npz", [], "--features digits, which measures pictures of the digits"),
        ("digits", ["--out", str(tmp_path)], "--out is"),
        (
            "digits",
            ["--npz", str(tmp_path / "small.npz")],
            "has pictures of 12x12 pixels; the digits features",
        ),
        (tmp_path / "one.npz", [*by_digits, "--npz", str(tmp_path / "one.npz")], "12x12"),
    ):
        arguments = ["--npz", samples, "--reference", str(reference), *options]
        assert command.main("evaluate.py", arguments) == 2, message
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in said and said.startswith("evaluate.py: "), said
    with pytest.raises(ConfigError, match="the samples are 1; expected at least 2"):
        evaluate(
            features_of(extractor, SAMPLES[:1]),
            load_reference(str(tmp_path / "small.npz"), extractor, 12),
            extractor,
        )


def test_a_result_that_its_run_cannot_take_is_a_warning(tmp_path, capsys):
    (tmp_path / "evaluations.jsonl").mkdir()
    append_evaluation(
        tmp_path, Evaluation({"fid": 1.0}, {}, "digits", "", None, "other", "0" * 64, None, 2, {})
    )
    assert "evaluations.jsonl cannot be written (Is a directory)" in capsys.readouterr().err


def test_statistics_that_cannot_be_kept_are_made_nonetheless(extractor, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    np.savez(tmp_path / "array.npz", arr_0=PICTURES)
    assert load_reference(str(tmp_path / "array.npz"), extractor, 12).count == 40
    assert "could not be kept" in capsys.readouterr().err
