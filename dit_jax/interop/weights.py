"""A trained network as every format gives and takes it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from dit_jax import paths
from dit_jax.config import DIT_SIZES, Config, ConfigError, ModelConfig, ProcessConfig, resolve
from dit_jax.interop.diffusers import autoencoder_config
from dit_jax.models.create import build_model, init_params

SD_AUTOENCODER = "stabilityai/sd-vae-ft-ema"


@dataclass(frozen=True)
class Latents:
    """The latents that a network was trained on: (z - shift) * scaling of an autoencoder's z, of square pictures."""

    vae: str
    """Where the autoencoder lies: a diffusers folder, a hub id, or `digits`."""
    image_size: int
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0


@dataclass(frozen=True)
class Weights:
    """A network's parameters and what is known of them.

    Attributes:
      config: resolved; of other people's weights the parts `model` and `diffusion` alone mean something.
      params: float32, on the host.
      source: where they are from, in a word or two.
      label_names: name of each class, empty where they have none.
      step: of training, 0 where it is not known.
      dataset: the dataset.json of the run that they are of, as its JSON says, if it is one of ours.
      texts: where the encoder of captions lies, a folder or a hub id; empty where its name says.
    """

    config: Config
    params: dict[str, Any]
    source: str
    latents: Latents
    label_names: tuple[str, ...] = ()
    step: int = 0
    dataset: Mapping[str, Any] | None = None
    texts: str = ""

    def digest(self) -> str:
        """SHA-256 of the parameters and of what they are parameters of."""
        sha = hashlib.sha256(repr((self.config.model, self.config.diffusion)).encode())
        for leaf in jax.tree.leaves(self.params):
            sha.update(np.ascontiguousarray(leaf).data)
        return sha.hexdigest()


@dataclass(frozen=True)
class Reading:
    """What a user says of weights that do not say it themselves.

    Attributes:
      which: the averaged or the raw weights, of files that hold both (None: the averaged).
      process: what weights under published names were trained as (None: as the file says, or as a DiT).
      config: a recipe of their network and process, where their sizes are not in the table.
      vae: where the autoencoder lies (None: where the weights say).
      step: of a run's checkpoint (None: the newest).
    """

    which: Literal["ema", "params"] | None = None
    process: Literal["dit", "sit"] | None = None
    config: Config | None = None
    vae: str | None = None
    step: int | None = None


def shapes_of(config: Config) -> dict[str, Any]:
    """The parameters' shapes of a resolved config's network."""
    return jax.eval_shape(lambda key: init_params(build_model(config), config, key), jax.random.key(0))


def latents_of(vae: str, side: int, image_size: int | None = None) -> Latents:
    """The latents of this side by an autoencoder that lies here; by Stable Diffusion's factors where it does not."""
    try:
        config = (
            autoencoder_config(vae) if vae == "digits" or paths.is_folder(os.path.expanduser(vae)) else None
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"the autoencoder cannot be read: {error}") from None
    if config is None:
        return Latents(vae, image_size or 8 * side)
    size = config.downsample_factor * side
    return Latents(vae, size, float(config.scaling_factor), float(config.shift_factor or 0.0))


def sized(
    depth: int, width: int, heads: int | None, patch: int, diffusion: ProcessConfig, where: str, **model: Any
) -> Config:
    """A resolved config of these sizes; the heads by the table of sizes where they are not given.

    Raises ConfigError where the table has no such network, or the sizes do not fit.
    """
    named = {(d, w): (name, h) for name, (d, w, h) in DIT_SIZES.items()}
    name, table_heads = named.get((depth, width), ("XL", None))
    heads = heads or table_heads
    if heads is None:
        raise ConfigError(
            f"{where} has {depth} blocks of width {width}, which is no DiT-S, B, L or XL; expected --config, a "
            "recipe that says the number of heads"
        )
    sizes: dict[str, Any] = {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": patch}
    try:
        return resolve(
            Config(model=ModelConfig(name=f"DiT-{name}/{patch}", **sizes, **model), diffusion=diffusion)
        )
    except ConfigError as error:
        raise ConfigError(f"{where} cannot be used: {error}") from None


def name_of(place: paths.Named) -> str:
    """The last part of a path, or a hub id whole."""
    path = paths.to_path(place)
    return path.name if paths.is_file(path) or paths.is_folder(path) else str(place)
