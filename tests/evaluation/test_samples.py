"""Files of samples: back and forth, and what is no such file."""

import os

import numpy as np
import pytest

from dit_jax.config import ConfigError
from dit_jax.evaluation.digits import report
from dit_jax.evaluation.samples import Provenance, load_provenance, load_samples, save_samples

IMAGES, LABELS = (
    np.arange(2 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 32, 32, 3),
    np.arange(2),
)


def test_round_trip(tmp_path):
    save_samples(tmp_path / "s.npz", IMAGES, LABELS)
    images, labels = load_samples(tmp_path / "s.npz")
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)


def test_provenance_lies_beside_the_arrays(tmp_path):
    known = Provenance(run="runs/digits", step=300, guidance={"scale": 1.5, "interval": None}, seed=0)
    save_samples(tmp_path / "s.npz", IMAGES, LABELS, known)
    assert load_provenance(tmp_path / "s.npz") == known
    np.testing.assert_array_equal(load_samples(tmp_path / "s.npz")[0], IMAGES)
    save_samples(tmp_path / "s.npz", IMAGES, LABELS)
    np.savez(tmp_path / "other.npz", IMAGES, LABELS)
    np.savez(tmp_path / "bad.npz", IMAGES, LABELS, provenance=np.array("["))
    for name in ("s.npz", "other.npz"):
        assert load_provenance(tmp_path / name) == Provenance()
    with pytest.raises(ConfigError, match=r"bad\.npz, whose provenance cannot be read"):
        load_provenance(tmp_path / "bad.npz")


def test_what_is_no_file_of_samples_is_named(tmp_path):
    save_samples(tmp_path / "whole.npz", IMAGES, LABELS)
    whole = (tmp_path / "whole.npz").read_bytes()
    for name, content in (("cut", whole[:500]), ("empty", b""), ("text", b"nothing"), ("missing", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"--npz names .*{name}, which cannot be read"):
            load_samples(tmp_path / name)
    np.save(tmp_path / "one.npy", IMAGES)
    with pytest.raises(ConfigError, match=r"which cannot be read \(it holds a single array\)"):
        load_samples(tmp_path / "one.npy")
    save_samples(tmp_path / "float.npz", IMAGES / 255.0, LABELS)
    with pytest.raises(ConfigError, match=r"arr_0 \(2, 32, 32, 3\) float64 .*; expected images .* uint8"):
        load_samples(tmp_path / "float.npz")
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "", "x" * 300):
        with pytest.raises(ConfigError, match=r"which cannot be read \(it is no file\)"):
            load_samples(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES, "labels": LABELS}, "cannot be read .*arr_0"),
        ({"arr_0": IMAGES}, "cannot be read .*arr_1"),
        ({"arr_0": np.array([{}, None]), "arr_1": LABELS}, "cannot be read .*Object arrays"),
        ({"arr_0": IMAGES[0], "arr_1": LABELS}, r"with arr_0 \(32, 32, 3\) uint8"),
        ({"arr_0": IMAGES[..., :2], "arr_1": LABELS}, r"with arr_0 \(2, 32, 32, 2\) uint8"),
        ({"arr_0": IMAGES, "arr_1": LABELS[:1]}, r"arr_1 \(1,\) int64; expected"),
        ({"arr_0": IMAGES, "arr_1": LABELS[:, None]}, r"arr_1 \(2, 1\) int64; expected"),
        ({"arr_0": IMAGES, "arr_1": LABELS / 2}, r"arr_1 \(2,\) float64; expected"),
        ({"arr_0": IMAGES, "arr_1": np.array(["a", "b"])}, r"arr_1 \(2,\) <U1; expected"),
    ],
)
def test_arrays_that_are_no_samples_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ConfigError, match=message):
        load_samples(tmp_path / "s.npz")


def test_a_damaged_compressed_file_is_named(tmp_path):
    np.savez_compressed(tmp_path / "s.npz", arr_0=IMAGES, arr_1=LABELS)
    content = bytearray((tmp_path / "s.npz").read_bytes())
    content[60:100] = bytes(40)
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(ConfigError, match="which cannot be read"):
        load_samples(tmp_path / "s.npz")


@pytest.mark.parametrize("count", [0, 1])
def test_a_distance_needs_two_samples(count):
    with pytest.raises(ConfigError, match=f"the samples are {count}; expected at least 2"):
        report(IMAGES[:count], LABELS[:count])
