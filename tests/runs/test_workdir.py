"""Which options may change when a run goes on, and what is no folder of a run."""

import pytest

from dit_jax.config import ConfigError
from dit_jax.runs.workdir import check_same_run, check_workdir


@pytest.mark.parametrize(
    ("group", "option", "value"),
    [
        ("compute", "norm_kernel", "pallas"),
        ("compute", "attention", "xla"),
        ("compute", "dtype", "bfloat16"),
        ("compute", "quantization", "fp8"),
        ("model", "name", "DiT-B/2"),  # every size is given
        ("data", "vae", "elsewhere"),
        ("train", "keep", 9),
    ],
)
def test_what_changes_no_mathematics_may_change(tiny, group, option, value):
    sizes = {"patch_size": 2, "depth": 2, "hidden_size": 32, "num_heads": 2}
    saved = tiny.config(model=sizes)
    parts = {"model": sizes}
    parts[group] = parts.get(group, {}) | {option: value}
    config = tiny.config(**parts)
    check_same_run(config, saved, "run")


@pytest.mark.parametrize(
    ("group", "option", "value"),
    [
        ("model", "depth", 3),
        ("diffusion", "loss", "rescaled_mse"),
        ("optim", "eps", 1e-5),
        ("train", "seed", 1),
    ],
)
def test_what_changes_the_mathematics_makes_another_run(tiny, group, option, value):
    with pytest.raises(ConfigError, match=f"--{group}.{option} is {value!r}; the run in run has"):
        check_same_run(tiny.config(**{group: {option: value}}), tiny.config(), "run")


def test_a_workdir_that_is_no_folder_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name, found in (("file", "no folder"), ("dangling", "a link to .*gone, no folder")):
        with pytest.raises(
            ConfigError, match=f"--train.workdir is .*{name}', which is {found}; expected a folder"
        ):
            check_workdir(tiny.config(), tmp_path / name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("folder", "link", "new", "x" * 5000):  # what cannot be made is found when it is made
        check_workdir(tiny.config(), tmp_path / name)
