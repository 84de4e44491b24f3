"""Files of tensors by name: safetensors, and PyTorch's pickles, which are read as data and never run."""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit_jax import paths
from dit_jax.buckets import BucketError
from dit_jax.config import ConfigError
from dit_jax.files import whole_file

Tensors = dict[str, np.ndarray]
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (*PICKLED, ".safetensors")


@dataclass(frozen=True)
class TensorFile:
    """What a file of weights holds.

    Attributes:
      sets: state dicts by name; {"": tensors} is a bare one, {"ema": ..., "model": ...} those of a training run.
      args: the options of the program that trained it, where they are stored.
    """

    sets: Mapping[str, Mapping[str, Any]]
    args: Mapping[str, Any] = field(default_factory=dict)

    def arrays(self, name: str) -> Tensors:
        """One of the state dicts, on the host; half precision becomes float32."""
        return {key: _array(tensor) for key, tensor in self.sets[name].items()}


def read_tensor_file(file: paths.Named) -> TensorFile:
    """The state dicts of a .safetensors file or of a pickle that torch wrote.

    Of a pickle the tensors are read when `arrays` asks for them. Raises ConfigError, naming the file, where it is
    cut, holds other objects than weights and plain values, or torch is missing.
    """
    path = paths.to_path(file)
    if path.suffix == ".safetensors":
        return TensorFile({"": read_safetensors(path)})
    found = _unpickled(path)
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path} holds a {type(found).__name__}; expected tensors by name")
    wrapped = {
        key: found[key] for key in ("ema", "model", "state_dict") if isinstance(found.get(key), Mapping)
    }
    args = found.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    sets = {"" if key == "state_dict" else key: tensors for key, tensors in wrapped.items()} or {"": found}
    for tensors in sets.values():
        for key, tensor in tensors.items():
            if not (isinstance(key, str) and hasattr(tensor, "numpy")):
                raise ConfigError(
                    f"{path} holds {type(tensor).__name__} {str(key)[:80]!r}; expected tensors by name"
                )
    return TensorFile(sets, args if isinstance(args, Mapping) else {})


def read_safetensors(file: paths.Named) -> Tensors:
    """The tensors of a safetensors file, bfloat16 among them; ConfigError where it is not whole."""
    import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 by it)
    import safetensors
    import safetensors.numpy

    try:
        with paths.local_file(paths.to_path(file)) as here:
            return safetensors.numpy.load_file(here)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {error}") from None


def weight_files(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    """The file of weights of this name, or the several that NAME.index.json names; none where there are none.

    Raises ConfigError where the index cannot be read, or one of the several is missing.
    """
    if paths.is_file(folder / name):
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not paths.is_file(index):
        return []
    try:
        files = sorted(set(map(str, json.loads(paths.read_bytes(index))["weight_map"].values())))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index} cannot be read ({error!r}); expected a map of weights") from None
    for file in files:
        if pathlib.Path(file).name != file or not paths.is_file(folder / file):
            raise ConfigError(f"{folder} has no {file[:200]}; expected it, as {index.name} names it")
    return [folder / file for file in files]


def write_safetensors(file: paths.Named, tensors: Tensors) -> None:
    """Write a safetensors file, which is never half there."""
    import safetensors.numpy

    with whole_file(file) as beside:
        # As bytes: safetensors' own file would be readable by its owner alone.
        beside.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))


def write_pickled(file: paths.Named, tensors: Tensors) -> None:
    """Write a bare state dict as `torch.save` does, which is never half there."""
    torch = _torch(file)
    with whole_file(file) as beside:
        try:
            torch.save({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}, beside)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(_short(error)) from None


def _unpickled(path: pathlib.Path) -> Any:
    torch = _torch(path)
    try:
        # A training run keeps its options as a Namespace, which holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), paths.local_file(path) as here:
            # What is mapped stays readable when the copy of a file in a bucket goes.
            return torch.load(here, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(here))
    except BucketError:
        raise
    except pickle.UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), ""
        )
        if "global" in reason.lower():
            raise ConfigError(
                f"{path} holds more than weights ({_short(reason)}), which would have to be run; expected tensors "
                "and plain values alone"
            ) from None
        raise ConfigError(f"{path} is no whole file of PyTorch's ({_short(error)})") from None
    except Exception as error:  # torch has no error of its own for files that are cut or something else
        raise ConfigError(f"{path} is no whole file of PyTorch's ({_short(error)})") from None


def _torch(path: object) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{path} is a file of PyTorch's, but {error}: pip install 'dit_jax[interop]'"
        ) from None
    return torch


def _array(tensor: Any) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor.astype(np.float32, copy=False)
    return tensor.detach().float().numpy()


def _short(error: object) -> str:
    """The first sentence of an error, in one line."""
    return " ".join(str(error).split())[:160].split(". ")[0] or type(error).__name__
