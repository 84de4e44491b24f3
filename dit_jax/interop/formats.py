"""Every format of whole networks, by name: which one a place is of, how it is read and written."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Literal

from dit_jax.config import ConfigError
from dit_jax.interop import bundle, diffusers, official, pipeline
from dit_jax.interop.tensor_files import SUFFIXES
from dit_jax.interop.weights import Reading, Weights

Kind = Literal["run", "pt", "diffusers", "folder"]

WRITERS: dict[str, Callable[[pathlib.Path, Weights], None]] = {
    "pt": official.write_published,
    "diffusers": pipeline.write_pipeline,
    "folder": bundle.write_bundle,
}


def is_run(place: str) -> bool:
    """Whether a place is the folder of a run of ours."""
    return os.path.isdir(os.path.join(place, "checkpoints"))


def read_weights(place: str, reading: Reading, option: str) -> Weights:
    """Other people's weights, or a folder of ours, from a place that `option` names: a file, a folder or a hub id.

    Raises ConfigError where there is none, or it is damaged, unsafe or of another network.
    """
    path = pathlib.Path(place).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ConfigError(
                f"{option} is {place}; expected a file that ends with {', '.join(SUFFIXES)}, or a folder"
            )
        return official.read_published(path, reading)
    named = [f"--{name}" for name in ("config", "process") if getattr(reading, name) is not None]
    if reading.which == "params":
        named.append("--weights params")
    if named:
        raise ConfigError(
            f"{named[0]} is given with {option} {place}; expected only with a file such as {place}.pt"
        )
    folder = path if path.is_dir() else _from_hub(place, option)
    if (folder / pipeline.INDEX).is_file():
        return pipeline.read_pipeline(place, folder, reading)
    if bundle.is_bundle(folder):
        return bundle.read_bundle(place, folder, reading)
    raise ConfigError(
        f"{option} is {place}, which has neither {pipeline.INDEX} (diffusers) nor {bundle.CONFIG} with "
        f"{bundle.TENSORS}; expected one of them, or a run"
    )


def _from_hub(place: str, option: str) -> pathlib.Path:
    """The folder with the small files and the network's weights of a hub's repository."""
    if not diffusers.is_hub_id(place) or pathlib.Path(place).suffix in SUFFIXES:
        raise ConfigError(
            f"{option} is {place[:200]!r}, which is not there; expected a file, a folder or a hub id such as "
            "facebook/DiT-XL-2-256"
        )
    small, weights = (
        [*pipeline.FILES, bundle.CONFIG],
        [bundle.TENSORS, f"transformer/{diffusers.WEIGHTS_FILE}"],
    )
    try:
        folder = diffusers.from_hub(f"{option} {place}", place, small + weights)
        if (folder / pipeline.INDEX).is_file() and diffusers.weights_file(
            folder / pipeline.TRANSFORMER
        ) is None:
            folder = diffusers.from_hub(
                f"{option} {place}", place, [*small, f"transformer/{diffusers.PICKLED_FILE}"]
            )
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None
    return folder
