"""Our own self-contained folder, for the Hub: config.json, model.safetensors and a README.md with the recipe.

The tensors have our own names and layouts, so that every network that we train has this format. An autoencoder that
lies in a folder goes along, in `vae/`; one with a hub id, or `digits`, is named.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from dit_jax import paths
from dit_jax.config import Config, ConfigError, TextConfig, from_json, resolve, to_json
from dit_jax.files import write_whole
from dit_jax.interop import diffusers, keymap
from dit_jax.interop.pipeline import read_json
from dit_jax.interop.tensor_files import read_safetensors, write_safetensors
from dit_jax.interop.weights import Latents, Reading, Weights, latents_of, shapes_of

CONFIG, TENSORS, README = "config.json", "model.safetensors", "README.md"
FORMAT, VERSION = "dit_jax", 1
FIELDS = ("version", "config", "step", "source", "label_names", "latents", "dataset")


def is_bundle(folder: pathlib.Path) -> bool:
    """Whether a folder is of this format, by the names of its files."""
    return paths.is_file(folder / CONFIG) and paths.is_file(folder / TENSORS)


def read_bundle(place: str, folder: pathlib.Path, reading: Reading) -> Weights:
    """The weights of a folder that `write_bundle` wrote; ConfigError, naming the file, where it is damaged."""
    file = folder / CONFIG
    found = read_json(file)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise ConfigError(
            f"{file} is of format {str(found.get('format'))[:40]} {str(found.get('version'))[:40]}; expected "
            f"{FORMAT} {VERSION}"
        )
    try:
        config = resolve(from_json(json.dumps(found["config"])))
        latents = Latents(**found["latents"])
        rest: dict[str, Any] = {
            "source": str(found["source"]), "step": int(found["step"]), "dataset": found["dataset"],
            "texts": str(found.get("texts", "")),  # which earlier folders do not say
            "label_names": tuple(map(str, found["label_names"])),
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be used ({type(error).__name__}: {error}); expected what was written"
        ) from None
    if reading.vae:
        latents = latents_of(reading.vae, config.model.input_size[0])
    elif paths.is_folder(folder / "vae"):
        hub = not paths.is_folder(paths.from_user(place))
        latents = dataclasses.replace(latents, vae=place if hub else str(folder.absolute()))
    return Weights(config=config, params=_tensors(folder / TENSORS, config), latents=latents, **rest)


def write_bundle(folder: pathlib.Path, weights: Weights) -> None:
    """Write the files of this format into a folder."""
    latents = weights.latents
    if paths.is_folder(os.path.expanduser(latents.vae)):
        try:
            diffusers.copy_autoencoder(latents.vae, folder / "vae")
        except (OSError, ValueError) as error:
            raise ConfigError(f"the autoencoder cannot be read: {error}") from None
        latents = dataclasses.replace(latents, vae="vae")
    said = {
        "format": FORMAT, "version": VERSION, "config": json.loads(to_json(weights.config)), "step": weights.step,
        "source": weights.source, "label_names": weights.label_names, "latents": dataclasses.asdict(latents),
        "dataset": weights.dataset, "texts": weights.texts,
    }  # fmt: skip
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in keymap.flatten(weights.params).items()}
    write_whole(folder / CONFIG, json.dumps(said, indent=2) + "\n")
    write_whole(folder / README, _readme(weights))
    write_safetensors(folder / TENSORS, flat)


def _tensors(file: pathlib.Path, config: Config) -> dict[str, Any]:
    rules = [keymap.Rule(".*", r"\g<0>")]  # our own names and layouts
    try:
        return keymap.to_flax(read_safetensors(file), shapes_of(config), rules, str(file))
    except keymap.MismatchError as error:
        raise ConfigError(str(error)) from None


def _plain(config: Config) -> Config:
    """The defaults of networks and processes of these kinds."""
    return resolve(Config(model=type(config.model)(), text=config.text, diffusion=type(config.diffusion)()))


def _readme(weights: Weights) -> str:
    """A page for people: what this is, how to draw from it, and the options that are not the defaults."""
    m, d = weights.config.model, weights.config.diffusion
    given, plain = (
        dataclasses.asdict(weights.config),
        dataclasses.asdict(_plain(weights.config)) | {"text": dataclasses.asdict(TextConfig().filled())},
    )
    options = [
        " ".join(
            [f"--{group}.{name}".replace("_", "-"), *map(str, value if type(value) is tuple else [value])]
        )
        for group in ("model", "text", "diffusion", "optim")
        for name, value in given[group].items()
        if value != plain[group][name]
    ]
    vae = "vae/" if paths.is_folder(os.path.expanduser(weights.latents.vae)) else weights.latents.vae
    side = "x".join(map(str, (*m.input_size, m.in_channels)))
    size = sum(np.size(leaf) for leaf in keymap.flatten(weights.params).values())
    classes = f"{m.num_classes} classes" if m.num_classes else "no classes"
    return "\n".join(
        [
            "---",
            "library_name: dit_jax",
            "tags: [diffusion, jax, image-generation]",
            "---",
            "",
            f"# {m.name}, {size / 1e6:.1f}M parameters, {d.kind}",
            "",
            f"A Diffusion Transformer on latents of {side} by the autoencoder `{vae}`, {classes}, of "
            f"{weights.source}, step {weights.step}.",
            "",
            "    python sample.py --from FOLDER --num-samples 16",
            "    python convert.py FOLDER RUN --to run",
            "",
            "The recipe is in config.json; what differs from the defaults:",
            "",
            *(f"    {option}" for option in options or ["nothing"]),
            "",
        ]
    )
