"""sample.py's pictures between two samples, from a picture, around a part of one, and on their way."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from dit_jax.config import ConfigError
from dit_jax.generation.command import SampleArgs, main
from dit_jax.generation.editing import kept_part

SIDE = 32


@pytest.fixture(scope="module")
def workdir(data_dir, tmp_path_factory):
    """A tiny run on the digits' latents."""
    folder = tmp_path_factory.mktemp("run")
    with tarfile.open(data_dir / "earlier_version.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


@pytest.fixture
def draw(workdir, tmp_path):
    """Pictures (N, h, w, 3) of options of sample.py."""

    def pictures(**options):
        npz = tmp_path / "samples.npz"
        args = SampleArgs(
            workdir=str(workdir), npz=str(npz), **{"steps": 4, "num_samples": 3, "cfg_scale": 1.0} | options
        )
        assert main(args) == 0
        with np.load(npz) as found:
            return found["arr_0"].astype(int)

    return pictures


def picture(path, seed):
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(values).save(path)
    return values


def test_pictures_between_two_samples_begin_and_end_with_them(draw):
    between = draw(interpolate=(1, 4), labels=["2", "3"], num_samples=5)
    samples = draw(labels=["2"], num_samples=5)
    np.testing.assert_allclose(between[[0, 4]], samples[[1, 4]], atol=1)
    assert np.abs(between[2] - between[0]).max() > 2 < np.abs(between[2] - between[4]).max()


def test_a_picture_is_changed_by_the_steps_that_are_left(draw, tmp_path):
    values = picture(tmp_path / "start.png", 0)
    changes = [
        np.abs(draw(init_image=str(tmp_path / "start.png"), strength=strength, steps=20) - values).mean()
        for strength in (0.05, 1.0)
    ]
    assert changes[0] < 0.7 * changes[1]


def test_what_is_black_in_the_mask_stays(draw, tmp_path):
    values, mask = picture(tmp_path / "picture.png", 1), np.zeros((SIDE, SIDE), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = draw(inpaint=(str(tmp_path / "mask.png"), str(tmp_path / "picture.png")))
    assert found.shape == (3, SIDE, SIDE, 3)
    np.testing.assert_array_equal(found[:, :, :16], np.broadcast_to(values[:, :16], (3, SIDE, 16, 3)))
    assert np.abs(found[:, :, 16:] - values[:, 16:]).mean() > 5
    keep = kept_part(np.stack([mask] * 3, axis=-1), (8, 4))
    assert keep.shape == (1, 8, 4, 1) and keep[0, :, :2].all() and not keep[0, :, 2:].any()


def test_the_way_is_an_animation_and_a_strip(draw, tmp_path):
    draw(trajectory=str(tmp_path / "way.gif"))
    with Image.open(tmp_path / "way.gif") as animation:
        assert animation.n_frames == 5 and animation.info["loop"] == 0
    with Image.open(tmp_path / "way_strip.png") as strip:
        tile = 64 + 2  # three samples in two rows each, at five moments
        assert strip.size == (5 * tile - 2, 6 * tile - 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"interpolate": (0, 1), "init_image": "a.png"},
            "--interpolate and --init-image are both given",
        ),
        (
            {"init_image": "nowhere.png"},
            "--init-image names nowhere.png, which is no picture .*; expected a PNG",
        ),
        ({"init_image": "a.png", "strength": 0.0}, "--strength is 0.0; expected above 0 and up to 1"),
        ({"interpolate": (-1, 1)}, r"--interpolate is \(-1, 1\); expected two numbers of samples"),
        ({"trajectory": "way.mp4"}, r"--trajectory is way.mp4; expected a file that ends with .gif"),
        (
            {"trajectory": "w.gif", "num_samples": 9, "batch_size": 8},
            "--num-samples is 9 with --trajectory",
        ),
        (
            {"trajectory": "a.gif", "out": "a_strip.png"},
            "--out is a_strip.png, where --trajectory puts its strip",
        ),
        ({"guide_workdir": ".", "guide_step": 7}, "--guide-step is 7; .* has 4"),
        ({"interpolate": (0, 1), "sampler": "dopri5"}, "--sampler is dopri5, whose steps are its own"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(draw, options, message, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    with pytest.raises(ConfigError, match=message) as refused:
        draw(**options)
    assert "\n" not in str(refused.value)
