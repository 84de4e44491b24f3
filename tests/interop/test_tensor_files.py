"""Files of tensors: what of PyTorch's pickles is read, what never runs, and what is said of damaged ones."""

import argparse
import json
import os
import pickle

import numpy as np
import pytest

from dit_jax.config import ConfigError
from dit_jax.interop.tensor_files import read_safetensors, read_tensor_file, write_pickled


class Evil:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def refused(file, message):
    with pytest.raises(ConfigError, match=message) as raised:
        read_tensor_file(file)
    text = str(raised.value)
    assert "\n" not in text and len(text) < 600 and text.startswith(str(file))


def test_code_in_a_pickle_is_refused_and_never_run(peers, tmp_path):
    torch, _ = peers
    trace = tmp_path / "was_run"
    tensor = torch.zeros(2)
    torch.save({"w": tensor, "x": Evil(trace)}, tmp_path / "zip.pt")
    torch.save({"w": tensor, "x": Evil(trace)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Evil(trace), protocol=2))
    (tmp_path / "new.bin").write_bytes(pickle.dumps(Evil(trace)))
    for name in ("zip.pt", "old.pt", "plain.bin"):
        refused(
            tmp_path / name, "holds more than weights .*mkdir.*, which would have to be run; expected tensors"
        )
        assert not trace.exists()
    refused(tmp_path / "new.bin", "is no whole file of PyTorch's")  # torch writes no such protocol
    assert not trace.exists()
    pickle.loads((tmp_path / "plain.bin").read_bytes())
    assert trace.exists()  # it would have


def test_files_that_are_cut_or_something_else(peers, tmp_path):
    torch, _ = peers
    file = tmp_path / "a.pt"
    torch.save({"w": torch.arange(5000.0)}, file)
    whole = file.read_bytes()
    for cut in (0, 1, 50, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:cut])
        refused(file, "is no whole file of PyTorch's")
    for content in (b"text", b"\x80\x02.", json.dumps({}).encode(), b"\0" * 999):
        file.write_bytes(content)
        refused(file, "is no whole file of PyTorch's")
    for found, message in (
        ([1, 2], "holds a list; expected tensors by name"),
        ({"w": 1.0}, "holds float 'w'; expected tensors by name"),
        ({3: torch.zeros(1)}, "holds Tensor '3'; expected tensors by name"),
    ):
        torch.save(found, file)
        refused(file, message)


def test_a_damaged_safetensors_file(tmp_path):
    file = tmp_path / "a.safetensors"
    for content in (b"", b"\xff" * 20, (1 << 60).to_bytes(8, "little") + b"{}"):
        file.write_bytes(content)
        refused(file, "is not a whole safetensors file")


def test_what_a_training_run_leaves(peers, tmp_path):
    torch, _ = peers
    sets = {name: {"w": torch.full((2,), float(i)).half()} for i, name in enumerate(("model", "ema"))}
    args = argparse.Namespace(path_type="Linear", image_size=256)
    torch.save({**sets, "opt": {"state": {0: torch.ones(2)}}, "args": args}, tmp_path / "a.pt")
    found = read_tensor_file(tmp_path / "a.pt")
    assert set(found.sets) == {"model", "ema"} and found.args["path_type"] == "Linear"
    assert found.arrays("ema")["w"].dtype == np.float32 and found.arrays("ema")["w"][0] == 1


def test_half_precision_of_sixteen_bits_is_read_exactly(peers, tmp_path):
    torch, _ = peers
    import safetensors.torch

    values = torch.tensor([1.5, -3.25], dtype=torch.bfloat16)
    safetensors.torch.save_file({"w": values}, tmp_path / "a.safetensors")
    torch.save({"w": values}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        found = read_tensor_file(tmp_path / name).arrays("")["w"]
        assert found.dtype == np.float32 and found.tolist() == [1.5, -3.25]
    safetensors.numpy.save_file({"x": np.ones(2, np.float16)}, tmp_path / "b.safetensors")
    assert read_safetensors(tmp_path / "b.safetensors")["x"].dtype == np.float16


def test_without_torch_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"x")
    refused(tmp_path / "a.pt", r"is a file of PyTorch's, but .*torch.*: pip install 'dit_jax\[interop\]'")
    with pytest.raises(ConfigError, match="pip install"):
        write_pickled(tmp_path / "b.pt", {"w": np.zeros(1)})
    assert not (tmp_path / "b.pt").exists()
