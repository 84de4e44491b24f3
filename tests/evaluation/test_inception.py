"""The Inception network and its resizes against pytorch-fid's, torch-fidelity's and PyTorch's own."""

import numpy as np
import pytest

from dit_jax.config import ConfigError
from dit_jax.evaluation.inception import inception_extractor
from dit_jax.interop.inception import find_inception, load_inception
from dit_jax.models.inception import network_input, resize_matrix


@pytest.fixture(scope="module")
def found(inception_file, recorder):
    """Features of the small pictures under both conventions."""
    return {
        convention: inception_extractor(str(inception_file), convention, batch_size=8)(
            recorder.pictures("small")
        )
        for convention in ("adm", "pytorch-fid")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["adm/pool", "adm/spatial", "adm/logits", "pytorch-fid/pool", "pytorch-fid/spatial"]
)
def test_features_are_those_of_the_peers(found, recorded, name):
    convention, feature = name.split("/")
    ours, theirs = found[convention][feature], recorded[name]
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    for one, other in zip(ours, theirs, strict=True):
        assert np.linalg.norm(one - other) < 1e-4 * np.linalg.norm(other)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.slow
def test_a_picture_has_its_features_in_whatever_company(found, inception_file, recorder):
    pictures = recorder.pictures("small")
    many = np.concatenate([pictures] * 5)[:9]  # two batches, the second filled up
    again = inception_extractor(str(inception_file), "adm", batch_size=3)(many)
    for name, values in again.items():
        assert len(values) == 9
        np.testing.assert_allclose(values[8], found["adm"][name][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["small", "large"])
def test_resizes_are_those_of_the_peers(name, recorder, recorded):
    import torch

    pictures = recorder.pictures(name)
    ours = np.asarray(network_input(pictures, "adm"))[:, recorder.PLACES, recorder.PLACES]
    np.testing.assert_allclose(ours, (recorded[f"resized/{name}"] - 128) / 128, atol=1e-5)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    theirs = 2 * torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
    ours = np.asarray(network_input(pictures, "pytorch-fid"))
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=2e-5)


@pytest.mark.parametrize("convention", ["adm", "pytorch-fid"])
def test_a_picture_of_the_networks_size_stays_as_it_is(convention):
    np.testing.assert_array_equal(resize_matrix(299, convention), np.eye(299, dtype=np.float32))
    np.testing.assert_allclose(resize_matrix(1, convention), np.ones((299, 1)))


def test_both_kinds_of_file_give_the_same(inception_file, inception_state, tmp_path):
    import jax
    import torch

    extra = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7)}
    tensors = {n: torch.nn.Parameter(torch.from_numpy(v)) for n, v in inception_state.items()} | extra
    # The published file is older than PyTorch's zip files.
    torch.save(tensors, tmp_path / "inception.pth", _use_new_zipfile_serialization=False)
    (one, first), (other, second) = load_inception(inception_file), load_inception(tmp_path / "inception.pth")
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert len(first) == 64 and first != second


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_files_that_do_not_serve_are_refused_in_one_sentence(inception_state, tmp_path, monkeypatch):
    import safetensors.numpy
    import torch

    monkeypatch.delenv("DIT_JAX_INCEPTION", raising=False)
    with pytest.raises(
        ConfigError,
        match=r"--inception is not given and \$DIT_JAX_INCEPTION is not set; expected .*pt_inc",
    ):
        find_inception(None)
    monkeypatch.setenv("DIT_JAX_INCEPTION", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"\$DIT_JAX_INCEPTION is .*none, where there is no file"):
        find_inception(None)
    with pytest.raises(ConfigError, match="--inception is elsewhere, where there is no file"):
        find_inception("elsewhere")

    small = {name: tensor for name, tensor in inception_state.items() if not name.startswith("Mixed")}
    safetensors.numpy.save_file(small | {"more": np.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-100])
    torch.save({"model": Malicious()}, tmp_path / "code.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04nothing")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        (
            "other.safetensors",
            r"holds other weights \(\d+ tensors missing, 1 tensors unexpected\); expected",
        ),
        ("cut.safetensors", "cannot be read"),
        ("code.pth", "cannot be read .*Weights only"),
        ("cut.pth", "cannot be read"),
        ("list.pth", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            load_inception(tmp_path / name)
        assert "\n" not in str(error.value) and "pt_inception-2015-12-05-6726825d.pth" in str(error.value)
