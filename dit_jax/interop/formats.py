"""Every format of whole networks, by name: which one a place is of, how it is read and written."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Literal

from dit_jax import paths
from dit_jax.config import ConfigError, MMDiTConfig
from dit_jax.interop import bundle, diffusers, official, pipeline, sd3_pipeline
from dit_jax.interop.tensor_files import SUFFIXES, TensorFile, read_tensor_file, weight_files
from dit_jax.interop.weights import Reading, Weights

Kind = Literal["run", "pt", "diffusers", "folder"]
Writer = Callable[[pathlib.Path, Weights], str | None]
"""Writes weights to a new file or into a folder; says what is left out, if anything."""


def is_run(place: str) -> bool:
    """Whether a place is the folder of a run of ours."""
    return paths.is_folder(paths.to_path(place) / "checkpoints")


def open_file(place: str) -> TensorFile | None:
    """The file of tensors that a place names, None where it names none; errors as of `read_tensor_file`."""
    path = paths.from_user(place)
    return read_tensor_file(path) if path.suffix in SUFFIXES and paths.is_file(path) else None


def read_weights(place: str, reading: Reading, option: str, opened: TensorFile | None = None) -> Weights:
    """Other people's weights, or a folder of ours, from a place that `option` names: a file, a folder or a hub id.

    opened: the file, where it has been read. Raises ConfigError where there is none, or it is damaged, unsafe or of
    another network.
    """
    path = paths.from_user(place)
    if paths.is_file(path):
        if path.suffix not in SUFFIXES:
            raise ConfigError(
                f"{option} is {place}; expected a file that ends with {', '.join(SUFFIXES)}, or a folder"
            )
        return _read_file(path, opened or read_tensor_file(path), reading)
    named = [f"--{name}" for name in ("config", "process") if getattr(reading, name) is not None]
    if reading.which == "params":
        named.append("--weights params")
    if named:
        raise ConfigError(
            f"{named[0]} is given with {option} {place}; expected only with a file such as {place}.pt"
        )
    folder = path if paths.is_folder(path) else _from_hub(place, option)
    if paths.is_file(folder / pipeline.INDEX):
        of_sd3 = sd3_pipeline.is_sd3(pipeline.read_json(folder / pipeline.INDEX))
        return (sd3_pipeline.read_sd3_pipeline if of_sd3 else pipeline.read_pipeline)(place, folder, reading)
    if bundle.is_bundle(folder):
        return bundle.read_bundle(place, folder, reading)
    raise ConfigError(
        f"{option} is {place}, which has neither {pipeline.INDEX} (diffusers) nor {bundle.CONFIG} with "
        f"{bundle.TENSORS}; expected one of them, or a run"
    )


def _read_file(path: pathlib.Path, opened: TensorFile, reading: Reading) -> Weights:
    """The weights of a published file: of Stable Diffusion 3, or of a DiT or SiT."""
    if path.suffix == ".safetensors" and sd3_pipeline.holds_sd3(tensors := dict(opened.sets[""])):
        if reading.config is not None or reading.process is not None:
            raise ConfigError(f"--config or --process is given with {path}, which has neither; expected none")
        return sd3_pipeline.read_single_file(path, tensors, reading)
    return official.read_published(path, opened, reading)


def _write_pipeline(folder: pathlib.Path, weights: Weights) -> str:
    """A pipeline of diffusers, of the class that has this network."""
    if isinstance(weights.config.model, MMDiTConfig):
        return sd3_pipeline.write_sd3_pipeline(folder, weights)
    pipeline.write_pipeline(folder, weights)
    return ""


def _from_hub(place: str, option: str) -> pathlib.Path:
    """The folder with the small files and the network's weights of a hub's repository."""
    if not diffusers.is_hub_id(place) or pathlib.Path(place).suffix in SUFFIXES:
        raise ConfigError(
            f"{option} is {place[:200]!r}, which is not there; expected a file, a folder or a hub id such as "
            "facebook/DiT-XL-2-256"
        )
    small, weights = (
        [*pipeline.FILES, *sd3_pipeline.FILES, bundle.CONFIG],
        [bundle.TENSORS, f"transformer/{diffusers.WEIGHTS_FILE}"],
    )
    try:
        folder = diffusers.from_hub(f"{option} {place}", place, small + weights)
        there = folder / pipeline.TRANSFORMER
        found = diffusers.weights_file(there) or weight_files(there, diffusers.WEIGHTS_FILE)
        if (folder / pipeline.INDEX).is_file() and not found:
            folder = diffusers.from_hub(
                f"{option} {place}", place, [*small, f"transformer/{diffusers.PICKLED_FILE}"]
            )
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None
    return folder


WRITERS: dict[str, Writer] = {
    "pt": official.write_published,
    "diffusers": _write_pipeline,
    "folder": bundle.write_bundle,
}
