"""Weights from one format into another, the folder of a run among them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np

from dit_jax import paths
from dit_jax.buckets import BucketError
from dit_jax.conditions import TextCondition, condition_of
from dit_jax.config import Config, ConfigError, DiTConfig, LoraConfig, run_config, to_json
from dit_jax.data.metadata import LatentMetadata, StoredText
from dit_jax.files import check_folder, whole_folder, write_whole
from dit_jax.interop import keymap
from dit_jax.interop.bundle import CONFIG
from dit_jax.interop.diffusers import CONFIG_FILE, weights_hash
from dit_jax.interop.formats import WRITERS, Kind, Writer, is_run, open_file, read_weights
from dit_jax.interop.ldm import convert_autoencoder, holds_autoencoder
from dit_jax.interop.lora import write_lora
from dit_jax.interop.pipeline import INDEX
from dit_jax.interop.weights import Latents, Reading, Weights, name_of, shapes_of
from dit_jax.models.create import build_model
from dit_jax.models.lora import LORA
from dit_jax.runs.checkpoint import say
from dit_jax.runs.weights import load_weights, save_weights
from dit_jax.runs.workdir import read_metadata

WEIGHTS = "weights:"
"""What the source of a dataset begins with of which nothing is known but other people's weights."""
LAST = {"run": "config.json", "diffusers": INDEX, "folder": CONFIG}
"""The file of a format's folder by which others know that it is whole."""
CONVENTIONS = {"pt": "published", "diffusers": "diffusers"}
"""Whose constants the programs that read a format compute with (`config.model.convention`)."""


def convert(
    source: str,
    out: str,
    to: Kind | Literal["lora"] | None,
    reading: Reading,
    scaling_factor: float | None = None,
) -> str:
    """Read weights from one place and write them to another; what was done, in one line.

    to: the format of `out`, None for the one that its name, or else the source, tells: a .pt file; of a run our
    folder for the Hub; of anything else a run. "lora" writes the low-rank adaptation of a run alone. The autoencoder
    of latent diffusion becomes a diffusers folder, with its own scaling factor where it has one. Raises ConfigError
    before anything is written.
    """
    target = paths.to_path(os.path.expanduser(out))
    if paths.is_there(target):
        raise ConfigError(f"OUT is {out}, which exists; expected a new name")
    if not target.name:
        raise ConfigError(f"OUT is {out!r}, which names no file or folder; expected one")
    opened = open_file(source)
    if opened is not None and holds_autoencoder(opened):
        if to not in (None, "diffusers"):
            raise ConfigError(f"--to is {to}, but {source} is an autoencoder; expected diffusers")
        with _written(out, target), whole_folder(target, last=CONFIG_FILE) as beside:
            vae = convert_autoencoder(paths.from_user(source), opened, beside, scaling_factor)
        return f"{out} (diffusers): an autoencoder of {vae.latent_channels} channels, scaling {vae.scaling_factor:g}"
    if scaling_factor is not None:
        raise ConfigError(f"--scaling-factor is {scaling_factor}; expected only with an autoencoder's file")
    if to == "lora":
        with _written(out, target):
            return f"{out} (lora): {_write_lora(source, target, reading)}"
    kind = to or ("pt" if target.suffix in (".pt", ".pth") else "folder" if is_run(source) else "run")
    weights = read_run(source, reading) if is_run(source) else read_weights(source, reading, "IN", opened)
    theirs, ours = CONVENTIONS.get(kind), weights.config.model.convention
    if theirs not in (None, ours) and isinstance(weights.config.model, DiTConfig):
        say(
            f"warning: what reads {out} computes with the {theirs} constants, these weights are of the {ours} ones "
            "(--model.convention): its pictures differ slightly from those of sample.py"
        )
    with _written(out, target):
        if kind == "pt":
            WRITERS[kind](target, weights)
        else:
            with _new_folder(target, kind) as beside:
                write: Writer = write_run if kind == "run" else WRITERS[kind]
                left_out = write(beside, weights)
            if left_out:
                say(f"{out} is {left_out}")
    return f"{out} ({kind}): {described(weights)}"


@contextlib.contextmanager
def _written(out: str, target: pathlib.Path) -> Iterator[None]:
    """Where writing fails, a ConfigError that names OUT."""
    check_folder("OUT", target.parent)
    try:
        yield
    except BucketError:
        raise
    except OSError as error:
        raise ConfigError(
            f"OUT is {out[:400]}, which cannot be written ({error.strerror or error}); expected a place with room"
        ) from None


@contextlib.contextmanager
def _new_folder(target: pathlib.Path, kind: str) -> Iterator[pathlib.Path]:
    """A folder to write a format's files into, which becomes `target`; nothing is left where that fails."""
    if kind != "run" or not paths.is_remote(target):
        with whole_folder(target, last=LAST[kind]) as beside:
            yield beside
        return
    try:
        yield target  # a checkpoint is written into a bucket otherwise than onto a disk; config.json comes last
    except BaseException:
        paths.remove(target)
        raise


def described(weights: Weights) -> str:
    """What the weights are, in a few words."""
    count = sum(np.size(leaf) for leaf in keymap.flatten(weights.params).values())
    m, d = weights.config.model, weights.config.diffusion
    return (
        f"{count / 1e6:.1f}M parameters, depth {m.depth}, width {m.hidden_size}, patch {m.patch_size}, "
        f"{d.kind}, {m.convention} constants"
    )


# ----------------------------------------------------------------------------------------------- runs


def read_run(folder: str, reading: Reading) -> Weights:
    """The weights of a run's checkpoint, on the host; ConfigError where there is none."""
    for option in ("config", "process"):
        if getattr(reading, option) is not None:
            raise ConfigError(
                f"--{option} is given with the run {folder}, which has its own; expected neither"
            )
    path = paths.to_path(folder)
    config, metadata = run_config("IN", path), read_metadata("IN", path)
    params, step = _stored(path, config, reading)
    latents = Latents(metadata.vae, metadata.image_size, metadata.scaling_factor, metadata.shift_factor)
    if reading.vae:
        latents = dataclasses.replace(latents, vae=reading.vae)
    dataset = json.loads(metadata.to_json())
    config = dataclasses.replace(config, lora=LoraConfig())  # its weights have moved the others
    texts = metadata.text.place if metadata.text else ""
    return Weights(config, params, name_of(folder), latents, metadata.label_names, step, dataset, texts)


def _write_lora(run: str, target: pathlib.Path, reading: Reading) -> str:
    """Write the low-rank adaptation of a run; what it is, in a few words. ConfigError where the run has none."""
    config = run_config("IN", paths.to_path(run))
    if config.lora.rank == 0:
        raise ConfigError(
            f"--to is lora, but {run} was trained with --lora.rank 0; expected a run with a rank"
        )
    params, step = _stored(paths.to_path(run), config, reading, merge=False)
    write_lora(target, params[LORA], build_model(config), config.lora)
    return f"rank {config.lora.rank}, step {step}"


def _stored(folder: pathlib.Path, config: Config, reading: Reading, merge: bool = True) -> tuple[Any, int]:
    """(parameters on the host, step) of a run's checkpoint."""
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), shapes_of(config)
    )
    which, directory = reading.which or "ema", folder / "checkpoints"
    params, step = load_weights(directory, like, config, which, reading.step, merge=merge)
    return jax.device_get(params), step


def write_run(folder: pathlib.Path, weights: Weights) -> None:
    """Write what sample.py, evaluate.py and --train.init-from read of a run."""
    optim = dataclasses.replace(weights.config.optim, ema_more=(), ema_sigma_rel=())
    config = dataclasses.replace(weights.config, optim=optim)
    save_weights(folder / "checkpoints", weights.step, weights.params)
    write_whole(folder / "dataset.json", metadata_of(weights).to_json())
    write_whole(folder / "config.json", to_json(config))


def metadata_of(weights: Weights) -> LatentMetadata:
    """The dataset's metadata of weights: their own, or what is known of other people's data."""
    latents, m = weights.latents, weights.config.model
    try:
        vae_hash = weights_hash(latents.vae) if _is_here(latents.vae) else ""
    except OSError as error:
        raise ConfigError(f"the autoencoder cannot be read: {error}") from None
    if weights.dataset is not None:
        known: dict[str, Any] = {**weights.dataset, "vae": latents.vae}
        return LatentMetadata.from_json(json.dumps(known), f"the dataset of {weights.source}")
    return LatentMetadata(
        source=f"{WEIGHTS}{weights.source}", source_hash="", source_count=0, vae=latents.vae, vae_hash=vae_hash,
        vae_backend="", precision="", scaling_factor=latents.scaling_factor, shift_factor=latents.shift_factor,
        latent_shape=(*m.input_size, m.in_channels), image_size=latents.image_size, crop="", mirrors=False,
        dtype="float32", num_classes=m.num_classes, label_names=weights.label_names, shard_size=1, batch_size=1,
        text=_text_of(weights),
    )  # fmt: skip


def _text_of(weights: Weights) -> StoredText | None:
    """What is known of the captions of other people's data; None for a network that is told labels."""
    kind = condition_of(weights.config)
    if not isinstance(kind, TextCondition):
        return None
    sizes = (kind.length, kind.channels, kind.pooled, kind.clip_widths)
    return StoredText(kind.encoder, "", *sizes, place=weights.texts)


def _is_here(vae: str) -> bool:
    return vae == "digits" or paths.is_folder(os.path.expanduser(vae))
