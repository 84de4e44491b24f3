"""sample.py's requests that cannot be served are refused before any weights are read: the runs here have none."""

import dataclasses
import json
import os

import numpy as np
import pytest

from dit_jax.config import Config, ConfigError, GaussianConfig, ModelConfig, resolve, to_json
from dit_jax.data.metadata import LatentMetadata
from dit_jax.generation.command import SampleArgs, main
from dit_jax.generation.room import check_batch, check_pictures, picture_bytes
from dit_jax.memory import host_memory

CONFIG = resolve(
    Config(
        model=ModelConfig("DiT-S/2", depth=2, hidden_size=32, num_heads=2, input_size=(8, 8), num_classes=4)
    )
)
METADATA = LatentMetadata(
    source="s", source_hash="", source_count=4, vae="digits", vae_hash="", vae_backend="flax", precision="float32",
    scaling_factor=1.0, shift_factor=0.0, latent_shape=(8, 8, 4), image_size=32, crop="", mirrors=False,
    dtype="float16", num_classes=4, label_names=(), shard_size=4, batch_size=4,
)  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(CONFIG))
    (folder / "dataset.json").write_text(METADATA.to_json())
    return folder


def refuse(message, **options):
    with pytest.raises(ConfigError, match=message) as refused:
        main(SampleArgs(**options))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_a_good_request_is_stopped_by_the_missing_weights_alone(workdir):
    refuse("holds no finished checkpoint", workdir=str(workdir))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "--num-samples is 0; expected 1 to"),
        ({"num_samples": 10**11}, "--num-samples is 100000000000; expected 1 to 2147483647"),
        (
            {"num_samples": 2**31 - 1, "grid_count": 2**31 - 1},
            r"--num-samples is 2147483647: pictures of \d+\.\d GB, but there are",
        ),
        (
            {"num_samples": 2**31 - 1, "npz": "x.npz", "out": "x.png", "grid_count": 2**31 - 1},
            r"--grid-count is 2147483647: pictures of \d+\.\d GB, but there are",
        ),
        (
            {"num_samples": 2**31 - 1, "npz": "x.npz"},
            r"--npz is 'x.npz', a file of 13194\.\d GB, but its disk",
        ),
        ({"decode_batch": 0}, "--decode-batch is 0; expected 1 to"),
        ({"grid_count": -1}, "--grid-count is -1; expected 1 to"),
        ({"sampler": "rk4"}, "--sampler is 'rk4'; expected one of ddpm, ddim, euler, heun"),
        ({"grid": "cubic"}, "--grid is 'cubic'; expected uniform, respaced, .*, or times such as"),
        ({"sampler": "heun", "grid": "1,2"}, "--grid is 1,2; expected two or more times"),
        ({"sampler": "heun", "grid": "999,nan"}, "--grid is 999,nan; expected two"),
        ({"sampler": "heun", "grid": "shifted", "grid_shift": -1.0}, "--grid-shift is -1.0; expected"),
        ({"batch_size": 0}, "--batch-size is 0; expected 1 to"),
        ({"skip_layers": [0, 2]}, "--skip-layers names 2; expected 0 to 1"),
        (
            {"skip_layers": [0], "skip_layer_interval": (0.5, 0.1)},
            "--skip-layer-interval is 0.5 0.1; expected two",
        ),
        (
            {"skip_layers": [0], "skip_layer_scale": float("nan")},
            "--skip-layer-scale is nan; expected a finite",
        ),
        (
            {"skip_layers": [0], "sampler": "dopri5"},
            "--skip-layers with --sampler dopri5, whose steps are its own",
        ),
        ({"cfg_rescale": 1.5}, "--cfg-rescale is 1.5; expected 0 to 1"),
        (
            {"guide_workdir": "nowhere"},
            "--guide-workdir is nowhere, which has no config.json; expected the folder",
        ),
        ({"seed": 2**31}, "--seed is 2147483648"),
        ({"cfg_interval": (0, 10**30)}, r"--cfg-interval is \(0, 10*\); expected"),
        ({"cfg_scale": 1e39}, r"--cfg-scale is 1e\+39; expected a finite number"),
        ({"labels": ["9" * 5000]}, "--labels names class 9{40}; expected 0 to 3"),
        ({"out": ""}, "--out is '', which names no file"),
        ({"npz": ""}, "--npz is '', which names no file"),
        ({"out": "/dev/full"}, "--out is '/dev/full', which is a device or a pipe"),
        ({"out": "x" * 300}, r"--out is 'x.*', which cannot be written \(File name too long\)"),
        ({"npz": ("x" * 200 + "/") * 30 + "y"}, "--npz is .*where no file can be written"),
        ({"out": "/dev/full/x.png"}, "--out is '/dev/full', where no file can be written"),
    ],
)
def test_bad_requests(workdir, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse(message, workdir=str(workdir), **options)


def test_out_and_npz_are_two_files(workdir, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    refuse(
        "--out and --npz are both .*; expected two files",
        workdir=str(workdir), out=str(tmp_path / "a"), npz=str(tmp_path / "link" / "a"),
    )  # fmt: skip


def edited(**model):
    config = json.loads(to_json(CONFIG))
    return json.dumps(config | {"model": config["model"] | model}).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[]", r"config.json cannot be used \(the config is \[\]"),
        ("config.json", b"\xff", r"config.json cannot be used \(.*utf-8"),
        ("config.json", b"", "config.json cannot be used .*invalid json"),
        ("config.json", edited(depth=10**9), r"config.json cannot be used \(--model.depth is 1000000000"),
        ("config.json", edited(num_heads="2"), r"config.json cannot be used \(--model.num-heads is '2'"),
        ("config.json", edited(num_heads=-2), r"config.json cannot be used \(--model.num-heads is -2"),
        (
            "config.json",
            edited(hidden_size=None),
            r"config.json cannot be used \(--model.hidden-size is|no finished",
        ),
        ("config.json", edited(input_size=[8, float("nan")]), "config.json cannot be used"),
        (
            "config.json",
            None,
            "--workdir is .*, which has no config.json; expected the folder of a trained run",
        ),
        (
            "dataset.json",
            None,
            "--workdir is .*, which has no dataset.json; expected the folder of a trained run",
        ),
        ("dataset.json", b"\xff", r"dataset.json cannot be read \(.*utf-8"),
        ("dataset.json", b"[]", "dataset.json: "),
        (
            "dataset.json",
            METADATA.to_json().replace('"image_size": 32', f'"image_size": 1{"0" * 400}').encode(),
            "dataset.json has image_size 10{,90}...; expected 1 to 65535",
        ),
    ],
)
def test_what_a_run_says_of_itself_may_be_edited_or_cut(workdir, name, content, message):
    (workdir / name).unlink()
    if content is not None:
        (workdir / name).write_bytes(content)
    refuse(message, workdir=str(workdir))


def test_memory_for_pictures_is_known_before_any_is_drawn():
    assert picture_bytes(10, 32) == 10 * np.zeros((32, 32, 3), np.uint8).nbytes
    fit = host_memory() // (2 * picture_bytes(1, 256))
    check_pictures("--num-samples", fit - 1, 0, 256)
    for count, in_grid in ((fit + 1, 0), (fit - 1, fit // 2)):
        with pytest.raises(
            ConfigError, match=f"--num-samples is {count}: pictures of .* GB; .*|expected fewer"
        ):
            check_pictures("--num-samples", count, in_grid, 256)


def test_memory_for_a_batch_is_known_before_it_is_drawn():
    check_batch(CONFIG, 128, True, 8)
    with pytest.raises(
        ConfigError, match=r"--batch-size is 1000000000: \d+\.\d GB on each of 8 devices, which has"
    ):
        check_batch(CONFIG, 10**9, True, 8)


def test_a_run_without_its_folder_is_named(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    for folder in (tmp_path, tmp_path / "none", "x" * 5000, ""):
        refuse("--workdir is .*, which has no config.json", workdir=str(folder))


def test_a_guide_of_another_process_is_refused(workdir, tmp_path):
    other = tmp_path / "guide"
    other.mkdir()
    config = dataclasses.replace(CONFIG, diffusion=GaussianConfig(prediction="v"))
    (other / "config.json").write_text(to_json(config))
    (other / "dataset.json").write_text(METADATA.to_json())
    refuse(
        "--guide-workdir .* has other process .* than --workdir",
        workdir=str(workdir),
        guide_workdir=str(other),
    )
