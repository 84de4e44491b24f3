"""Pixels and grids."""

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax.pictures import grid, save_grid, to_uint8, to_uint8_on_device, wrap


def test_pixels_are_clipped_and_truncated_as_published():
    values = np.array([-2.0, -1.0, -0.999, 0.0, 0.5, 0.996, 1.0, 3.0])
    np.testing.assert_array_equal(to_uint8(values), [0, 0, 0, 128, 191, 254, 255, 255])


def test_grid_goes_row_by_row_with_white_between():
    images = np.stack([np.full((2, 3, 1), v, np.uint8) for v in (10, 20, 30)])
    canvas = grid(images, columns=2, gap=1)
    assert canvas.shape == (5, 7, 1)
    assert canvas[0, 0, 0] == 10 and canvas[0, 4, 0] == 20 and canvas[3, 0, 0] == 30
    assert (canvas[2] == 255).all() and (canvas[:, 3] == 255).all() and (canvas[3:, 4:] == 255).all()


def test_a_png_file_holds_the_grid(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    save_grid(tmp_path / "new" / "grid.png", images)
    read = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    np.testing.assert_array_equal(read, grid(images))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_small_pictures_are_enlarged_by_whole_factors(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 1), dtype=np.uint8)
    save_grid(tmp_path / "grid.png", images)
    read = np.asarray(Image.open(tmp_path / "grid.png"))
    assert read.shape == (64, 64)
    np.testing.assert_array_equal(read[::4, ::4], images[0, :, :, 0])


def test_a_device_makes_the_same_bytes_as_the_host():
    """Also where a product and a sum that are rounded once would give another byte."""
    borders = ((np.arange(257) - 128) / 127.5).astype(np.float32).view(np.int32)
    values = (borders + np.arange(-50, 51)[:, None]).view(np.float32).ravel()
    values = np.concatenate(
        [values[~np.isnan(values)], np.float32([0, -0.0, 1e-40, 3e38, -3e38, np.inf, -np.inf])]
    )
    rng = np.random.default_rng(0)
    values = np.concatenate([values, rng.uniform(-1.2, 1.2, 200_000).astype(np.float32)])
    with np.errstate(over="ignore"):
        expected = to_uint8(values)
    np.testing.assert_array_equal(jax.jit(to_uint8_on_device)(values), expected)


def test_captions_stand_under_their_pictures(tmp_path):
    """Pictures are where they were meant to be, and below each is ink where it has a caption."""
    images = np.random.default_rng(0).integers(0, 256, (5, 72, 72, 3), dtype=np.uint8)
    save_grid(
        tmp_path / "grid.png",
        images,
        columns=3,
        captions=["a seven", "", "x " * 5000, "Ü日本\n\t\x00", "w" * 99],
    )
    found = np.asarray(Image.open(tmp_path / "grid.png"))
    large = images.repeat(2, axis=1).repeat(2, axis=2)
    pad = 8
    for i, image in enumerate(large):
        left = pad + i % 3 * (144 + pad)
        top = np.flatnonzero((found[:, left : left + 144] == image[0]).all(axis=(1, 2)))
        np.testing.assert_array_equal(found[top[0] : top[0] + 144, left : left + 144], image)
        below = found[top[0] + 144 : top[0] + 160, left : left + 144]  # its first line
        assert (below.min() < 128) == (i != 1), i
    with pytest.raises(ValueError, match="5 images have 2 captions"):
        save_grid(tmp_path / "grid.png", images, captions=["a", "b"])
    save_grid(tmp_path / "gray.png", images[..., :1], captions=[""] * 5)


def test_texts_are_wrapped_to_a_few_lines():
    def wrapped(text, width=10):
        lines = wrap(text, width, len)
        assert all(len(line) <= width for line in lines)
        return lines

    assert wrapped("") == [""]
    assert wrapped("a three  left\nof a seven") == ["a three", "left of a", "seven"]
    assert wrapped("abcdefghijklmno pq") == ["abcdefghij", "klmno pq"]
    assert wrapped("one two six ten " * 9) == ["one two", "six ten", "one two", "six ten…"]
    assert wrapped("x" * 10_000)[-1] == "x" * 9 + "…"
    assert wrapped("a b", 1) == ["a", "b"]
