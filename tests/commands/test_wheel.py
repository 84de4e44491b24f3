"""`dit-jax` for those without a clone: the wheel in a folder of its own, run from another."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    *("--model.depth", "1", "--model.hidden-size", "32", "--model.num-heads", "2"),
    *("--train.batch-size", "16", "--train.steps", "2", "--train.sample-every", "0"),
    *("--optim.schedule", "constant"),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel in it, built from a copy of what the repository keeps."""
    folder = tmp_path_factory.mktemp("wheel")
    (source := folder / "source").mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dit_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    build = ["wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([*pip, *build], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("dit_jax-*.whl")
    install = ["install", "--no-index", "--no-deps", "--target", folder / "site", wheel]
    subprocess.run([*pip, *install], check=True, capture_output=True, text=True)
    shutil.rmtree(source)
    return folder / "site"


@pytest.fixture(scope="module")
def dit_jax(installed, tmp_path_factory):
    """A function that runs `dit-jax` in an unrelated folder and gives what it printed, and that folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    env = os.environ | {
        "PYTHONPATH": str(installed),  # before the environment's own packages
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }

    def run(*args, code=0, start=(installed / "bin" / "dit-jax",)):
        command = [sys.executable, *map(str, (*start, *args))]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        return done

    run.folder = folder
    return run


def test_it_holds_the_recipes_and_nothing_of_the_clone(installed):
    packaged = {path.name for path in (installed / "dit_jax" / "recipes").glob("*.py")}
    assert packaged == {path.name for path in (ROOT / "configs").glob("*.py")}
    here = {path.relative_to(ROOT / "dit_jax") for path in (ROOT / "dit_jax").rglob("*.py")}
    there = {path.relative_to(installed / "dit_jax") for path in (installed / "dit_jax").rglob("*.py")}
    assert {path for path in there if path.parts[0] != "recipes"} == here
    assert (installed / "dit_jax" / "assets" / "digits_vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert (installed / "dit_jax" / "assets" / "imagenet_classes.txt").is_file()
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"bin", "dit_jax"}


def test_from_digits_to_a_measure_of_samples(dit_jax):
    train = ("train", "--config", "digits", "--train.workdir", "run", *TINY)
    dit_jax(*train)
    folder = dit_jax.folder
    assert {path.name for path in (folder / "run" / "checkpoints").iterdir()} == {"2"}
    drawn = dit_jax("sample", "--workdir", "run", "--num-samples", 4, "--steps", 2, "--npz", "s.npz").stdout
    assert "4 pictures of step 2: s.npz" in drawn
    with np.load(folder / "s.npz") as found:
        assert found["arr_0"].shape == (4, 32, 32, 3)
    assert "4 generated digits" in dit_jax("evaluate", "--npz", "s.npz").stdout
    assert "1433 records" in dit_jax("prepare", "inspect", "data/digits", "--count", 2).stdout
    assert {path.name for path in folder.iterdir()} == {"data", "run", "s.npz"}


def test_recipes_go_by_name_and_by_path(dit_jax):
    (dit_jax.folder / "mine.py").write_text("from dit_jax.config import Config\nconfig = Config()\n")
    wrong = ("train", "--model.patch-size", 3)
    sides = {"mine.py": "(32, 32)", "configs/digits.py": "(8, 8)", "dit_xl2_imagenet512": "(64, 64)"}
    for name, side in sides.items():
        assert side in dit_jax(*wrong, "--config", name, code=2).stderr
    said = dit_jax("train", "--config", "imagenet", code=2).stderr
    assert said.startswith(
        "dit-jax train: --config names imagenet, which is not a file; expected a recipe such as"
    )
    assert said.count("\n") == 1 and " digits, " in said
    (dit_jax.folder / "mine.py").unlink()


def test_python_m_is_the_same(dit_jax, installed):
    assert dit_jax(start=("-c", "import dit_jax; print(dit_jax.__file__)")).stdout.startswith(str(installed))
    assert dit_jax("--help", start=("-m", "dit_jax")).stdout == dit_jax("--help").stdout


def test_what_cannot_be_planned_is_one_sentence(dit_jax):
    unknown = ("--config", "digits", "--compile-for", "v99:2x2")
    for command in ("train", "sample"):
        said = dit_jax(command, *unknown, code=2).stderr
        assert said.startswith(
            f"dit-jax {command}: --compile-for is 'v99:2x2'; expected a TPU topology such as"
        )
        assert said.count("\n") == 1
    said = dit_jax("train", "--dry-run", "--config", "digits", "--train.microbatch", 7, code=2).stderr
    assert said.startswith("dit-jax train: --train.microbatch is 7; expected") and said.count("\n") == 1
    assert dit_jax("train", "--coordinator", "host:1", code=2).stderr.startswith(
        "dit-jax train: --coordinator,"
    )
