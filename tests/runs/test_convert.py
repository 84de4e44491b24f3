"""convert.py and sample.py --from: every pair of formats to the bit, and what is refused."""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from dit_jax.commands import convert as command
from dit_jax.commands import sample
from dit_jax.config import ConfigError, FlowMatchingConfig, from_json, to_json
from dit_jax.data.metadata import LatentMetadata
from dit_jax.generation.command import SampleArgs, load_source, main, recipe
from dit_jax.generation.prompts import asked_of
from dit_jax.generation.sampling import sampling_model
from dit_jax.interop import keymap
from dit_jax.interop.formats import read_weights
from dit_jax.interop.imagenet import class_names
from dit_jax.interop.official import state_dict_from_params
from dit_jax.interop.weights import Latents, Reading, Weights, shapes_of
from dit_jax.models.create import build_model
from dit_jax.runs.checkpoint import Checkpoints
from dit_jax.runs.convert import convert, read_run, write_run
from dit_jax.runs.weights import initial_weights

NAMES = ("zero", "one, single", "two", "three")


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes_of(config))


@pytest.fixture(scope="module")
def config(tiny):
    return tiny.config(model={"mlp_ratio": 4.0}, diffusion={"num_timesteps": 1000})


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run of the digits' latents, as its own training would describe it."""
    from dit_jax.interop.diffusers import autoencoder_config, weights_hash

    folder = tmp_path_factory.mktemp("convert") / "run"
    vae = autoencoder_config("digits")
    metadata = LatentMetadata(
        source="s", source_hash="a", source_count=4, vae="digits", vae_hash=weights_hash("digits"),
        vae_backend="flax", precision="float32", scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor or 0.0,
        latent_shape=(8, 8, 4), image_size=32, crop="", mirrors=False, dtype="float16", num_classes=4,
        label_names=NAMES, shard_size=4, batch_size=4, count=4, shard_sha256=("0",),
    )  # fmt: skip
    latents = Latents("digits", 32, metadata.scaling_factor, metadata.shift_factor)
    dataset = json.loads(metadata.to_json())
    write_run(folder, Weights(config, random_params(config), "run", latents, NAMES, 12, dataset))
    return folder


def same_bits(found, expected):
    found, expected = keymap.flatten(found), keymap.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert np.asarray(found[path]).dtype == np.float32
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize(("name", "to"), [("x.pt", None), ("pipeline", "diffusers"), ("hub", None)])
def test_there_and_back_to_the_bit(peers, run, config, tmp_path, capsys, name, to):
    there, back = str(tmp_path / name), str(tmp_path / "back")
    said = convert(str(run), there, to, Reading())
    kind = to or ("pt" if name == "x.pt" else "folder")
    assert said.startswith(f"{there} ({kind}): 0.1M parameters, ")
    warned = capsys.readouterr().err
    assert ("warning: what reads" in warned) == (kind == "diffusers")
    assert convert(there, back, None, Reading(config=config if kind == "pt" else None)).startswith(
        f"{back} (run)"
    )
    original, found = read_run(str(run), Reading()), read_run(back, Reading())
    same_bits(found.params, original.params)
    convention = "diffusers" if kind == "diffusers" else "published"
    assert found.config.model == dataclasses.replace(
        config.model, name=found.config.model.name, convention=convention
    )
    if kind != "pt":
        assert found.label_names == NAMES and found.latents.image_size == 32
    if kind == "folder":
        assert found.config == original.config and found.step == 12
        assert (pathlib.Path(back) / "dataset.json").read_text() == (run / "dataset.json").read_text()
        page = (tmp_path / name / "README.md").read_text()
        assert (
            "--model.hidden-size 32\n" in page
            and "--model.input-size 8 8\n" in page
            and "of run, step 12" in page
        )


def test_every_network_of_ours_has_the_folders_format(tiny, run, tmp_path):
    config = tiny.config(model={"conditioning": "cross_attention", "num_classes": 0})
    config = dataclasses.replace(config, diffusion=FlowMatchingConfig(path="gvp"))
    weights = dataclasses.replace(
        read_run(str(run), Reading()),
        config=config,
        params=random_params(config),
        label_names=(),
        dataset=None,
    )
    write_run(tmp_path / "run", weights)
    convert(str(tmp_path / "run"), str(tmp_path / "hub"), None, Reading())
    found = read_weights(str(tmp_path / "hub"), Reading(), "IN")
    same_bits(found.params, weights.params)
    assert found.config == config
    for to, message in (
        ("diffusers", "--diffusion.kind is flow; DiTPipeline"),
        ("pt", "conditioning is 'cross"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(str(tmp_path / "hub"), str(tmp_path / "out"), to, Reading())
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_folders_autoencoder_goes_along(run, tmp_path):
    from dit_jax.interop.diffusers import asset_path, weights_hash

    vae = shutil.copytree(asset_path("digits_vae"), tmp_path / "vae")
    convert(str(run), str(tmp_path / "hub"), "folder", Reading(vae=str(vae)))
    shutil.rmtree(vae)
    found = read_weights(str(tmp_path / "hub"), Reading(), "IN")
    assert found.latents.vae == str(tmp_path / "hub")
    assert weights_hash(found.latents.vae) == weights_hash("digits")


def test_averaged_weights_unless_the_raw_ones_are_asked_for(tiny, run, tmp_path):
    fresh = tiny.run(config := tiny.config(), 1, 0)[0]
    state = dataclasses.replace(fresh, ema=(jax.tree.map(lambda x: x + 1, fresh.params),))
    folder = tmp_path / "run"
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(state, {"config": {}, "dataset": ""}, 1.0)
    (folder / "config.json").write_text(to_json(config))
    shutil.copy(run / "dataset.json", folder)
    for which, expected in ((None, state.ema[0]), ("ema", state.ema[0]), ("params", state.params)):
        same_bits(read_run(str(folder), Reading(which)).params, jax.device_get(expected))


# ------------------------------------------------------------------------------------- published files


def published(peers, file, config, seed=0, **more):
    """A published state dict of random weights at `file`, or what training leaves; its parameters."""
    torch, _ = peers
    params = random_params(config, seed)
    state = {k: torch.tensor(v) for k, v in state_dict_from_params(params, build_model(config)).items()}
    torch.save({"ema": state, "opt": {}, **more} if more else state, file)
    return params


def test_what_training_leaves_of_a_sit(peers, tiny, config, tmp_path):
    args = argparse.Namespace(path_type="GVP", prediction="noise", model="SiT-XL/2", num_classes=4)
    raw = random_params(config, 1)
    model = state_dict_from_params(raw, build_model(config))
    torch = peers[0]
    file = tmp_path / "0400000.pt"
    averaged = published(peers, file, config, model={k: torch.tensor(v) for k, v in model.items()}, args=args)
    from dit_jax.interop import weights as sizes

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(sizes.DIT_SIZES, "S", (2, 32, 2))  # in the table, so that heads are known
    found = read_weights(str(file), Reading(), "IN")
    assert found.config.diffusion == FlowMatchingConfig(path="gvp", prediction="noise", learn_sigma=True)
    assert (found.config.model.num_heads, found.config.model.input_size) == (2, (8, 8))
    same_bits(found.params, averaged)
    same_bits(read_weights(str(file), Reading("params"), "IN").params, raw)
    assert read_weights(str(file), Reading(process="dit"), "IN").config.diffusion.kind == "gaussian"
    monkeypatch.undo()


@pytest.mark.slow
def test_a_network_of_the_table_needs_no_recipe(peers, tiny, tmp_path):
    config = tiny.config(
        model=dict(depth=12, hidden_size=384, num_heads=6, patch_size=4, mlp_ratio=4.0, num_classes=1000),
        diffusion={"num_timesteps": 1000},
    )
    params = published(peers, tmp_path / "DiT-S-4.pt", config)
    said = convert(str(tmp_path / "DiT-S-4.pt"), str(tmp_path / "run"), None, Reading())
    assert "depth 12, width 384, patch 4, gaussian, published constants" in said
    found = read_run(str(tmp_path / "run"), Reading())
    same_bits(found.params, params)
    assert found.config.model == dataclasses.replace(config.model, name="DiT-S/4")
    assert found.label_names == class_names()
    assert found.latents == Latents("stabilityai/sd-vae-ft-ema", 64, 0.18215)
    plain = tiny.config(model=dataclasses.asdict(config.model), diffusion={"learn_sigma": False})
    published(peers, tmp_path / "sit.pt", plain)
    with pytest.raises(ConfigError, match="expected --process sit or --process dit"):
        read_weights(str(tmp_path / "sit.pt"), Reading(), "IN")
    flow = read_weights(str(tmp_path / "sit.pt"), Reading(process="sit"), "IN").config.diffusion
    assert flow == FlowMatchingConfig()
    shutil.copy(tmp_path / "DiT-S-4.pt", tmp_path / "SiT-S-4.pt")
    with pytest.raises(ConfigError, match=r"SiT-S-4.pt is named like a SiT, .*; expected --process sit or"):
        read_weights(str(tmp_path / "SiT-S-4.pt"), Reading(), "IN")
    flow = read_weights(str(tmp_path / "SiT-S-4.pt"), Reading(process="sit"), "IN").config.diffusion
    assert flow == FlowMatchingConfig(learn_sigma=True)


def test_bad_published_files(peers, config, tmp_path):
    torch, _ = peers
    file = tmp_path / "x.pt"
    published(peers, file, config)
    whole = torch.load(file)

    def refused(message, reading=Reading(config=config), **changes):  # noqa: B008
        torch.save({k: v for k, v in (whole | changes).items() if v is not None}, file)
        with pytest.raises(ConfigError, match=message) as raised:
            read_weights(str(file), reading, "IN")
        assert str(file) in str(raised.value) and "\n" not in str(raised.value)

    bare = Reading()
    refused("2 blocks of width 32, which is no DiT-S, B, L or XL; expected --config", bare)
    refused("has no x_embedder.proj.weight of 4 axes", bare, **{"x_embedder.proj.weight": None})
    refused("has no pos_embed of 3 axes", bare, pos_embed=torch.zeros(16, 32))
    refused(
        "has 3 channels of output; expected 4 or 8",
        bare,
        **{"final_layer.linear.weight": torch.zeros(12, 32)},
    )
    refused(r"missing final_layer.linear.bias \(32,\)", **{"final_layer.linear.bias": None})
    refused("pos_embed is not the 2D sine-cosine table", pos_embed=torch.zeros(1, 16, 32))
    with pytest.raises(ConfigError, match="--process is sit with --config, which has a process"):
        read_weights(str(file), Reading(process="sit", config=config), "IN")
    refused("--weights is params, but .* holds one set", Reading("params", config=config))


# ------------------------------------------------------------------------------------------- sampling


def pictures(tmp_path, **options):
    npz = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
    assert main(SampleArgs(num_samples=2, steps=3, cfg_scale=2.0, npz=str(npz), **options)) == 0
    with np.load(npz) as found:
        return found["arr_0"], found["arr_1"].tolist()


def test_sampling_from_every_format_is_sampling_a_run(peers, run, config, tmp_path):
    expected, labels = pictures(tmp_path, workdir=str(run), labels=["single", "two"])
    assert labels == [1, 2] and expected.std() > 10
    convert(str(run), str(tmp_path / "hub"), None, Reading())
    convert(str(run), str(tmp_path / "x.pt"), None, Reading())
    (tmp_path / "recipe.json").write_text((run / "config.json").read_text())
    for options in (
        {"source": str(run), "labels": ["single", "two"]},
        {"source": str(tmp_path / "hub"), "labels": ["single", "two"]},
        {"source": str(tmp_path / "x.pt"), "labels": ["1", "2"], "vae": "digits",
         "config": str(tmp_path / "recipe.json")},
    ):  # fmt: skip
        np.testing.assert_array_equal(pictures(tmp_path, **options)[0], expected)


def test_a_killed_command_goes_on_with_the_same_weights_alone(run, tmp_path):
    convert(str(run), str(tmp_path / "hub"), None, Reading())
    args = SampleArgs(source=str(tmp_path / "hub"), npz=str(tmp_path / "s.npz"))
    before = load_source(args)
    assert before.place == "run"
    changed = jax.tree.map(lambda leaf: leaf + 1, before.weights.params)
    after = dataclasses.replace(before, weights=dataclasses.replace(before.weights, params=changed))
    steps = {"step": 12, "guide_step": None}
    asked = asked_of(args, before, sampling_model(before.config))
    assert recipe(args, before, steps, asked) == recipe(args, load_source(args), steps, asked)
    assert recipe(args, before, steps, asked) != recipe(args, after, steps, asked)


def test_a_pipeline_samples_with_its_own_constants(pipeline_folder, tmp_path):
    convert(str(pipeline_folder), str(tmp_path / "run"), None, Reading())
    labels = ["other 207", "name 3"]
    found, numbers = pictures(tmp_path, source=str(pipeline_folder), labels=labels)
    assert numbers == [207, 3] and found.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(pictures(tmp_path, workdir=str(tmp_path / "run"), labels=labels)[0], found)
    file = tmp_path / "run" / "config.json"
    file.write_text(file.read_text().replace('"convention": "diffusers"', '"convention": "published"'))
    other = pictures(tmp_path, workdir=str(tmp_path / "run"), labels=labels)[0]
    assert (other != found).mean() > 0.1


def test_the_default_file_is_in_the_working_directory(run, tmp_path, monkeypatch):
    convert(str(run), str(tmp_path / "hub"), None, Reading())
    (tmp_path / ".cache").symlink_to(pathlib.Path(".cache").absolute())  # of compiled programs
    monkeypatch.chdir(tmp_path)
    assert main(SampleArgs(source="hub", num_samples=2, steps=3, cfg_scale=2.0)) == 0
    assert (tmp_path / "samples.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nothing/like/this"}, "--from is 'nothing/like/this', which is not there; expected a file"),
        ({"source": "nobody/no-such-dit"}, "--from nobody/no-such-dit is neither a folder nor a hub repository"),
        ({"source": "x.zip"}, r"--from is 'x.zip', which is not there"),
        ({"source": "{run}", "step": 5}, r"--step is 5; .* has 12"),
        ({"source": "{run}", "process": "sit"}, "--process is given; expected only with --from and published"),
        ({"workdir": "{run}", "config": "digits"}, "--config is given; expected only with --from"),
        ({"source": "{hub}", "step": 12}, "--step is 12 with --from .*, which has no steps"),
        ({"source": "{hub}", "process": "sit"}, "--process is given with --from .*hub; expected only with a file"),
        ({"source": "{hub}", "weights": "params"}, "--weights params is given with --from"),
        ({"source": "{hub}", "labels": ["four"]}, "--labels names 'four'; expected a class number or one of: zero"),
        ({"source": "{empty}"}, "which has neither model_index.json .* nor config.json with model.safetensors"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_from(run, tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    convert(str(run), str(tmp_path / "hub"), None, Reading())
    (tmp_path / "empty").mkdir()
    places = {"run": run, "hub": tmp_path / "hub", "empty": tmp_path / "empty"}
    filled = {k: v.format(**places) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ConfigError, match=message) as refused:
        main(SampleArgs(**filled))
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------- the rest


def test_a_converted_run_is_what_another_starts_from(tiny, pipeline_folder, tmp_path, capsys):
    convert(str(pipeline_folder), str(tmp_path / "given"), None, Reading())
    config = tiny.config(model={"mlp_ratio": 4.0}, train={"init_from": str(tmp_path / "given")})
    fresh = tiny.run(config, 1, 0)[0].params
    names = ("x", "name 207, other 207", "y", "z")
    found = jax.device_get(initial_weights(config, fresh, names))
    given = read_run(str(tmp_path / "given"), Reading()).params
    table, theirs = found["y_embed"].pop("embedding"), given["y_embed"].pop("embedding")
    same_bits(found, given)
    np.testing.assert_array_equal(table[[1, 4]], theirs[[207, 1000]])
    assert (table[0] != theirs).any(axis=1).all()
    said = capsys.readouterr().err
    assert "computed with --model.convention diffusers, this run with published" in said


def test_nothing_is_half_written(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    for to, name in (("folder", "write_safetensors"), ("diffusers", "write_safetensors")):
        module = "bundle" if to == "folder" else "pipeline"
        monkeypatch.setattr(f"dit_jax.interop.{module}.{name}", full)
        with pytest.raises(ConfigError, match=r"OUT is .*/out, which cannot be written \(no space left\)"):
            convert(str(run), str(tmp_path / "out"), to, Reading())
        assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_is_wrong_in_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    out = str(tmp_path / "out")

    def said(code, *args):
        assert command.main("convert.py", list(map(str, args))) == code
        found = capsys.readouterr()
        assert found.err.count("\n") <= 1
        return found.err or found.out

    assert "OUT is / , which" not in said(2, run, "/")
    assert said(2, run, run) == f"convert.py: OUT is {run}, which exists; expected a new name\n"
    assert "IN is 'nowhere', which is not there" in said(2, "nowhere", out)
    assert "--config is given with the run" in said(2, run, out, "--config", "digits")
    assert "--scaling-factor is 2.0; expected only" in said(2, run, out, "--scaling-factor", 2)
    assert "--step is 3; " in said(2, run, out, "--step", 3)
    assert "where no file can be written" in said(2, run, "/dev/full/x")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "checkpoints").mkdir()
    assert "cannot be written (File name too long)" in said(2, run, tmp_path / ("x" * 300))
    assert "has no config.json; expected the folder of a trained run" in said(2, tmp_path / "cut", out)
    (tmp_path / "text.txt").write_text("x")
    assert "expected a file that ends with .pt, " in said(2, tmp_path / "text.txt", out)
    assert not os.path.lexists(out)
    assert sample.main("sample.py", ["--from", "x", "--compile-for", "v5e:2x2"]) == 2
    assert "--from is x with --compile-for; expected" in capsys.readouterr().err
    assert said(0, run, out).startswith(f"{out} (folder): ")


def test_a_folder_that_was_edited_is_named(run, tmp_path):
    convert(str(run), str(tmp_path / "hub"), None, Reading())
    file = tmp_path / "hub" / "config.json"
    whole = json.loads(file.read_text())
    assert from_json(json.dumps(whole["config"])) is not None
    for changes, message in (
        ({"version": 2}, "is of format dit_jax 2; expected dit_jax 1"),
        ({"config": {"model": {"depth": -1}}}, "--model.depth is -1"),
        ({"latents": {"place": 3}}, "cannot be used"),
        (
            {"config": whole["config"] | {"model": whole["config"]["model"] | {"depth": 3}}},
            "misshapen: adaln/bias",
        ),
        ({"label_names": 3}, "cannot be used"),
        ({"dataset": {"version": 1}}, "dataset of run"),
    ):
        file.write_text(json.dumps(whole | changes))
        with pytest.raises(ConfigError, match=message) as refused:
            convert(str(tmp_path / "hub"), str(tmp_path / "out"), "run", Reading())
        assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_the_hub_gives_only_the_files_that_are_needed(pipeline_folder, tmp_path, monkeypatch):
    import huggingface_hub

    from dit_jax.interop import formats

    asked = []
    bare = shutil.copytree(pipeline_folder, tmp_path / "snapshot")
    weights = bare / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(kept := tmp_path / "kept")
    (bare / "vae" / "diffusion_pytorch_model.safetensors").unlink()

    def snapshot_download(name, allow_patterns):
        asked.append((name, set(allow_patterns)))
        if len(asked) == 2:  # a repository that has a pickle in its place: here the same file, by that name
            import torch

            state = read_tensors(kept)
            torch.save({k: torch.tensor(v) for k, v in state.items()}, weights.with_suffix(".bin"))
        return str(bare)

    from dit_jax.interop.tensor_files import read_safetensors as read_tensors

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = formats.read_weights("facebook/DiT-XL-2-256", Reading(), "--from")
    assert [name for name, _ in asked] == ["facebook/DiT-XL-2-256"] * 2
    assert "transformer/diffusion_pytorch_model.safetensors" in asked[0][1]
    assert "transformer/diffusion_pytorch_model.bin" in asked[1][1]
    assert not any(file.startswith("vae/diff") for _, files in asked for file in files)
    assert (
        found.latents == Latents("facebook/DiT-XL-2-256", 16, 0.7)
        and found.label_names[1] == "name 1, other 1"
    )


def test_a_full_disk_leaves_nothing(peers, run, small_disk):
    disk = small_disk(1)
    (disk / "taken").write_bytes(bytes(900_000))
    for name in ("x.pt", "hub"):
        with pytest.raises(ConfigError, match="which cannot be written"):
            convert(str(run), str(disk / name), None, Reading())
        assert [path.name for path in disk.iterdir()] == ["taken"]
