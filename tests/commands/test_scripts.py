"""The commands of the README, end to end on the embedded digits with a tiny network."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    *("--model.depth", "1", "--model.hidden-size", "32", "--model.num-heads", "2"),
    *("--train.batch-size", "32", "--train.log-every", "2", "--optim.schedule", "constant"),
]

pytestmark = pytest.mark.slow


def run(script, *args, code=0):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    args = ["--data.dir", folder / "data", "--train.workdir", folder / "run", *TINY]
    run("train.py", *args, "--train.steps", 4, "--train.sample-every", 4, "--train.sample-steps", 3)
    run("train.py", *args, "--train.steps", 6, "--train.sample-every", 0)  # rerunning goes on
    return folder / "run"


def test_a_run_leaves_config_metrics_checkpoints_and_pictures(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert json.loads((workdir / "config.json").read_text())["model"]["depth"] == 1
    assert {entry.name for entry in (workdir / "checkpoints").iterdir() if entry.name.isdigit()} == {"4", "6"}
    assert list((workdir / "tensorboard").glob("events.*"))
    with Image.open(workdir / "samples" / "0000004.png") as picture:
        assert picture.width > 500


def test_sampling_by_label_writes_grid_and_npz(workdir, tmp_path):
    wanted = ["--labels", "3", "7", "--num-samples", 6, "--steps", 3, "--seed", 5]
    out = run(
        "sample.py",
        "--workdir",
        workdir,
        *wanted,
        "--out",
        tmp_path / "grid.png",
        "--npz",
        tmp_path / "s.npz",
    ).stdout
    assert "step 6" in out
    with np.load(tmp_path / "s.npz") as found:
        images, labels = found["arr_0"], found["arr_1"]
    assert images.shape == (6, 32, 32, 3) and images.dtype == np.uint8
    assert labels.tolist() == [3, 7, 3, 7, 3, 7]
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (3 * 66 - 2, 2 * 66 - 2)
    run("sample.py", "--workdir", workdir, *wanted, "--npz", tmp_path / "b.npz", "--batch-size", 2)
    with np.load(tmp_path / "b.npz") as found:
        assert np.abs(found["arr_0"].astype(int) - images.astype(int)).max() <= 1
    report = run("evaluate.py", "--npz", tmp_path / "s.npz").stdout
    assert "6 generated digits" in report and "real test digits 98.9%" in report


def test_flow_matching_by_the_same_commands(workdir, tmp_path):
    data, folder = workdir.parent / "data", tmp_path / "flow"
    args = ["--config", "configs/digits_flow.py", "--data.dir", data, "--train.workdir", folder, *TINY]
    run("train.py", *args, "--train.steps", 2, "--train.sample-every", 2, "--train.sample-steps", 2)
    assert json.loads((folder / "config.json").read_text())["diffusion"]["kind"] == "flow"
    assert (folder / "samples" / "0000002.png").is_file()
    found = run(
        "sample.py", "--workdir", folder, "--sampler", "heun", "--steps", 2, "--num-samples", 4
    ).stdout
    assert "grid of 4 pictures of step 2" in found
    wrong = run("sample.py", "--workdir", folder, "--sampler", "ddpm", code=2).stderr.splitlines()
    assert wrong[-1].startswith("sample.py: --sampler is 'ddpm'; expected one of ")


def test_what_is_wrong_is_said_in_one_line(workdir, tmp_path):
    def error(*command):
        lines = run(*command, code=2).stderr.strip().splitlines()
        assert not any("Traceback" in line for line in lines)
        return lines[-1]

    assert "--steps is 5000; expected 2 to 1000" in error("sample.py", "--workdir", workdir, "--steps", 5000)
    assert "--labels names 'cat'" in error("sample.py", "--workdir", workdir, "--labels", "cat")
    assert "--step is 5; " in error("sample.py", "--workdir", workdir, "--step", 5)
    assert "has no config.json" in error("sample.py", "--workdir", tmp_path)
    assert f"--out is '{tmp_path}', which is a folder" in error(
        "sample.py", "--workdir", workdir, "--out", tmp_path
    )
    taken = workdir / "config.json"
    assert f"--train.workdir is '{taken}/run', where no file can be written" in error(
        "train.py", "--data.dir", workdir.parent / "data", "--train.workdir", taken / "run", *TINY
    )
    assert "cannot be read" in error("evaluate.py", "--npz", tmp_path / "none.npz")
    assert "patch-size 3" in error("train.py", "--model.patch-size", 3)
    assert "is not a file" in error("train.py", "--config", "configs/none.py")
