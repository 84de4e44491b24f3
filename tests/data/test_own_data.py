"""The way of docs/data.md with the commands themselves: a folder, a dataset, a run, a finer run, samples by name."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from started import ROOT, environment

RECIPE = """
from dit_jax.config import Config, DataConfig, ModelConfig, TrainConfig

config = Config(
    model=ModelConfig(name="DiT-S/4", depth=2, hidden_size=32, num_heads=2, input_size=(8, 8), num_classes=2),
    data=DataConfig(dir="shapes"),
    train=TrainConfig(workdir="run", batch_size=8, steps=2, log_every=1, checkpoint_every=2, sample_every=0),
)
"""


def draw_folder(folder, names, count=6):
    """A subfolder of PNGs per shape."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (48, 40), tuple(rng.integers(0, 256, 3).tolist()))
            draw, box = ImageDraw.Draw(image), (8, 4, 38, 34)
            {"disk": draw.ellipse, "square": draw.rectangle, "ring": draw.arc}[name](
                box, **({"start": 0, "end": 360} if name == "ring" else {}), fill="white"
            )
            image.save(folder / name / f"{i}.png")


def run(script, *args, cwd, code=0):
    """The output of a command that should end with this exit code."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, args)],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_from_a_folder_to_samples_by_name(tmp_path):
    draw_folder(tmp_path / "two", ["disk", "square"])
    draw_folder(tmp_path / "three", ["disk", "ring", "square"])
    (tmp_path / "recipe.py").write_text(RECIPE)
    options = ("--vae", "digits", "--image-size", 32, "--batch-size", 2, "--workers", 1)
    for source, out in (("two", "shapes"), ("three", "more")):
        run("prepare.py", "--source", f"folder:{source}", "--out", out, *options, cwd=tmp_path)

    output = run("train.py", "--config", "recipe.py", "--model.num-classes", 5, cwd=tmp_path, code=2)
    assert "the dataset in shapes has 2 classes; --model.num-classes says 5" in output
    run("train.py", "--config", "recipe.py", cwd=tmp_path)
    finer = (
        "--data.dir",
        "more",
        "--model.num-classes",
        3,
        "--train.workdir",
        "finer",
        "--train.init-from",
        "run",
    )
    run("train.py", "--config", "recipe.py", *finer, cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "finer" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()

    sample = ("--workdir", "finer", "--num-samples", 4, "--steps", 2, "--npz", "ring.npz")
    run("sample.py", *sample, "--labels", "ring", cwd=tmp_path)
    with np.load(tmp_path / "ring.npz") as found:
        assert found["arr_0"].shape == (4, 32, 32, 3)
        assert found["arr_1"].tolist() == [1, 1, 1, 1]
    assert "cube" in run("sample.py", *sample, "--labels", "cube", cwd=tmp_path, code=2)
