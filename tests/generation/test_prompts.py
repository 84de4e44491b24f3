"""Prompts: what a command names is what the pictures are told, and what cannot be told is refused."""

import json
import shutil

import numpy as np
import pytest

from dit_jax.conditions import TextCondition, byte_tokens
from dit_jax.config import ConfigError
from dit_jax.evaluation.samples import load_pictures, load_provenance
from dit_jax.generation import command, prompts, scoring
from dit_jax.generation.command import SampleArgs, load_run
from dit_jax.generation.prompts import Asked, Taken, asked_of
from dit_jax.generation.sampling import SamplingOptions, device_mesh, make_latent_sampler, sampling_model
from dit_jax.generation.scoring import ScoreArgs
from dit_jax.text.encoders import open_encoder

FEW = {"num_samples": 6, "steps": 3, "batch_size": 16, "sampler": "euler", "cfg_scale": 4.0}


@pytest.fixture
def sample(sd3_run, sd3_folder, tmp_path):
    """A function that draws with these options, and gives the arrays of the .npz file."""

    def draw(**options):
        file = options.get("npz") or str(tmp_path / f"{len(list(tmp_path.iterdir()))}.npz")
        args = {"workdir": str(sd3_run), "npz": file, "text_encoder": str(sd3_folder)}
        assert command.main(SampleArgs(**FEW | args | options)) == 0
        with np.load(file) as found:
            return dict(found)

    return draw


def test_pictures_are_of_their_prompts_in_turn(sample, tmp_path):
    found = sample(prompt=["a cat", "two dogs"])
    assert list(found["prompts"]) == ["a cat", "two dogs"] * 3 and "arr_1" not in found
    cats, dogs = (sample(prompt=[prompt])["arr_0"] for prompt in ("a cat", "two dogs"))
    np.testing.assert_array_equal(found["arr_0"][::2], cats[::2])
    np.testing.assert_array_equal(found["arr_0"][1::2], dogs[1::2])
    assert (cats != dogs).mean() > 0.1
    file = tmp_path / "0.npz"
    assert load_pictures(file)[1] is None
    known = load_provenance(file)
    assert known.prompts == ["a cat", "two dogs"] and known.negative_prompt is None


def test_prompts_of_a_file_are_the_same_prompts(sample, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa cat\r\n\n   \ntwo dogs\n".encode())
    np.testing.assert_array_equal(
        sample(prompts=str(file))["arr_0"], sample(prompt=["a cat", "two dogs"])["arr_0"]
    )


def test_a_negative_prompt_takes_the_place_of_the_null(sample):
    """Away from itself is nowhere; the null of a run that names none is zeros."""
    unguided = sample(prompt=["a cat"], cfg_scale=1.0)["arr_0"].astype(int)
    away_from_itself = sample(prompt=["a cat"], negative_prompt="a cat")["arr_0"]
    assert np.abs(away_from_itself - unguided).max() <= 1
    guided, other = sample(prompt=["a cat"])["arr_0"], sample(prompt=["a cat"], negative_prompt="")["arr_0"]
    assert (guided != unguided).mean() > 0.1 and (other != guided).mean() > 0.1


def test_the_null_is_an_argument_of_the_sampler(sd3_run, sd3_folder):
    """One program serves every negative prompt; zeros given are the null that is not."""
    run = load_run(sd3_run)
    model = sampling_model(run.config)
    params, _ = command._weights(run, device_mesh(1), "ema", None)
    found = open_encoder("sd3", 93, str(sd3_folder)).encode(["a cat", "", "dogs"])
    table = prompts.padded(found, model.condition)
    draw = make_latent_sampler(model, run.config, SamplingOptions("euler", 3, 4.0), device_mesh(1))
    of = {name: values[:1] for name, values in table.items()}
    nulls = [{name: values[i] for name, values in table.items()} for i in (1, 2)]
    first, second = (np.asarray(draw(params, 0, np.arange(1), of, null)) for null in nulls)
    assert draw.jitted._cache_size() == 1 and np.abs(first - second).max() > 1e-2
    zeros = {name: np.zeros_like(values[0]) for name, values in table.items()}
    np.testing.assert_allclose(
        draw(params, 0, np.arange(1), of, zeros), draw(params, 0, np.arange(1), of), atol=1e-5
    )


def test_parts_go_on_with_the_same_prompts_alone(sample, tmp_path, monkeypatch):
    whole = sample(prompt=["a cat", "b"])
    file, npz = tmp_path / "p.txt", str(tmp_path / "s.npz")
    file.write_text("a cat\nb\n")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "write_samples", killed)
        with pytest.raises(KeyboardInterrupt):
            sample(prompts=str(file), npz=npz)
    with pytest.raises(ConfigError, match=r"prompts \['a cat', 'b'\], not \['a cat', 'c'\]"):
        sample(prompt=["a cat", "c"], npz=npz)
    with pytest.raises(ConfigError, match=r"holds samples with negative_prompt .*, not"):
        sample(prompts=str(file), npz=npz, negative_prompt="dull")
    again = sample(prompts=str(file), npz=npz)
    np.testing.assert_array_equal(whole["arr_0"], again["arr_0"])
    assert list(again["prompts"]) == list(whole["prompts"])


def test_the_grid_shows_prompts_under_their_pictures(sample, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(command, "save_grid", lambda path, images, columns, captions: shown.append(captions))
    sample(prompt=["a cat", "b"], out=str(tmp_path / "grid.png"), grid_count=3)
    sample(prompt=["a cat", "b"], out=str(tmp_path / "grid.png"), interpolate=(0, 1), grid_count=4)
    assert shown == [["a cat", "b", "a cat"], ["a cat"] * 4]


def test_a_run_of_captions_is_measured(sd3_run, sd3_folder, tmp_path, monkeypatch):
    """evaluate.py --workdir draws the same pictures; no class is asked for, and none is agreed with."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = shutil.copytree(sd3_run, tmp_path / "run")
    args = {
        **FEW,
        "num_samples": 20,
        "cfg_scale": [4.0],
        "workdir": str(run),
        "text_encoder": str(sd3_folder),
    }
    (found,) = scoring.main(ScoreArgs(**args, prompt=["a cat", "b"]))
    assert found.count == 20 and "agreement" not in found.metrics
    assert found.provenance.prompts == ["a cat", "b"]


# --------------------------------------------------------------------------------- bytes


BYTES = TextCondition("bytes", 8)


class Run:
    """What is asked of a run whose network has an encoder of its own."""

    place, weights, condition = "a run", None, BYTES


def ask(**options):
    return asked_of(SampleArgs(**options), Run, Run)


def test_bytes_need_no_encoder(capfd):
    asked = ask(prompt=["a cat", "\u00e9"], negative_prompt="no")
    assert asked.embedded(BYTES) is asked and asked.captions == ("a cat", "\u00e9")
    np.testing.assert_array_equal(asked.named["tokens"], byte_tokens(["a cat", "\u00e9"], 8))
    np.testing.assert_array_equal(asked.null["tokens"], byte_tokens(["no"], 8)[0])
    assert capfd.readouterr().err == ""
    np.testing.assert_array_equal(ask(prompt=["x" * 10_000]).named["tokens"], byte_tokens(["x" * 7], 8))
    assert "the network reads 7 of 10000 bytes" in capfd.readouterr().err
    np.testing.assert_array_equal(ask().named["tokens"], byte_tokens([""], 8))
    assert "no --prompt is given" in capfd.readouterr().err


def test_a_network_that_reads_bytes_draws_what_it_is_told(bytes_run, tmp_path):
    def draw(*captions, **options):
        npz = str(tmp_path / "s.npz")
        args = dict(
            workdir=str(bytes_run), npz=npz, prompt=list(captions), num_samples=4, steps=2, batch_size=16
        )
        assert command.main(SampleArgs(**args | {"cfg_scale": 40.0} | options)) == 0
        return load_pictures(npz)[0].astype(int)

    both = draw("three", "seven")
    np.testing.assert_array_equal(both[::2], draw("three")[::2])
    assert np.abs(both[1::2] - draw("three")[1::2]).max() > 8
    assert np.abs(draw("three", negative_prompt="three") - draw("three", cfg_scale=1.0)).max() <= 1


def test_conditions_of_many_samples_are_rows_of_a_table():
    table = np.random.default_rng(0).normal(size=(3, 4, 5))
    asked = Asked({"context": table}, ("a", "b", "c"))
    rows = asked.rows(SampleArgs(), 10**6)
    taken = asked.conditions(rows)["context"]
    assert isinstance(taken, Taken) and len(taken) == 10**6
    np.testing.assert_array_equal(taken[np.array([0, 4, 999_999])], table[[0, 1, 0]])
    np.testing.assert_array_equal(np.asarray(Taken(table, np.array([2, 2]))), table[[2, 2]])
    assert asked.captions_of(rows[:4]) == ["a", "b", "c", "a"]


# --------------------------------------------------------------------------------- what is refused


def refused(run, **options):
    with pytest.raises(ConfigError) as error:
        command.main(SampleArgs(**{"workdir": str(run), **FEW} | options))
    said = str(error.value)
    assert "\n" not in said and len(said) < 500
    return said


def test_options_that_the_run_does_not_take(tiny_run, sd3_run, sd3_folder):
    for name, value in {"prompt": ["x"], "prompts": "x", "negative_prompt": "", "text_encoder": "x"}.items():
        option = f"--{name.replace('_', '-')} is given"
        assert refused(tiny_run, **{name: value}).startswith(option)
    assert "told captions; expected --prompt" in refused(sd3_run, labels=["3"])
    assert "both given" in refused(sd3_run, prompt=["x"], prompts="x")
    assert "guides by nothing" in refused(sd3_run, prompt=["x"], negative_prompt="y", cfg_scale=1.0)
    assert "both given" in refused(sd3_run, prompt=["x"], negative_prompt="y", guide_workdir=str(sd3_run))
    assert "is not there" in refused(sd3_run, prompt=["x"], text_encoder="/nowhere/at all")
    with pytest.raises(ConfigError, match="encoder of its own"):
        ask(prompt=["x"], text_encoder=str(sd3_folder))


def test_an_encoder_of_other_widths_is_refused(sd3_run, sd3_folder, tmp_path):
    run = shutil.copytree(sd3_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["text"]["clip_widths"] = [20, 20]
    (run / "config.json").write_text(json.dumps(config))
    assert "widths (16, 24); the network was trained with (20, 20)" in refused(
        run, prompt=["x"], text_encoder=str(sd3_folder)
    )


def test_files_of_prompts_that_are_none(sd3_run, tmp_path):
    file = tmp_path / "p.txt"
    for content, expected in {
        b"": "holds no prompt",
        b"\n \r\n": "holds no prompt",
        b"\xff\xfe": "UTF-8",
    }.items():
        file.write_bytes(content)
        assert expected in refused(sd3_run, prompts=str(file))
    for place in (tmp_path, tmp_path / "nothing", "/dev/zero", "a\0b"):
        assert "expected a file of UTF-8 text" in refused(sd3_run, prompts=str(place))
    assert "expected text that is UTF-8" in refused(sd3_run, prompt=["\udcff"])
