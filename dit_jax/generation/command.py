"""What sample.py does: the weights of a run, its samples, a PNG grid and an .npz."""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import Config, ConfigError, run_config
from dit_jax.config.saved import shown
from dit_jax.data.metadata import LatentMetadata
from dit_jax.evaluation.samples import save_samples
from dit_jax.files import check_file
from dit_jax.generation.room import check_batch, check_pictures, picture_bytes
from dit_jax.generation.sampling import (
    SamplingOptions,
    check_sampling,
    generate_images,
    load_decoder,
    sampling_model,
)
from dit_jax.models.create import init_params
from dit_jax.models.dit import DiT
from dit_jax.pictures import save_grid
from dit_jax.runs.weights import Kind, load_weights
from dit_jax.runs.workdir import read_metadata
from dit_jax.samplers.grid import GRIDS, GridName


@dataclass(frozen=True)
class SampleArgs:
    """Draw pictures from a trained run."""

    workdir: str = "runs/digits"
    """Folder of the run."""
    labels: list[str] = field(default_factory=list)
    """Classes by number or name, used in turn (default: all classes in turn); number:3 where 3 is a name as well."""
    num_samples: int = 64
    """How many pictures."""
    sampler: str | None = None
    """Name of a sampler, such as ddim (the default of a Gaussian run), ddpm (ancestral), dpmpp_2m, unipc_2, euler
    (the default under flow matching), heun or dopri5; a name that does not serve the run is answered with those
    that do."""
    steps: int = 50
    """Sampling steps."""
    eta: float = 0.0
    """Noise of DDIM: 0 deterministic, 1 like DDPM."""
    grid: str | None = None
    """Where the sampler stops: uniform, respaced (whole timesteps, for ddpm and ddim), lambda, karras, quadratic,
    shifted, or the times themselves from noise to data, such as 999,700,300,-1 (default: the sampler's own)."""
    grid_shift: float = 3.0
    """Of --grid shifted: above 1 more steps are near the noise."""
    cfg_scale: float = 1.5
    """Guidance scale; 1 for none."""
    cfg_channels: int | Literal["all"] = "all"
    """Latent channels that are guided: all, or the first few (the published DiT sampler: 3)."""
    cfg_interval: tuple[int, int] | tuple[float, float] | None = None
    """Lowest and highest time, as the network is shown it, with guidance (default: everywhere): timesteps of a
    Gaussian run, under flow matching 0 (noise) to 1 (data) unless the recipe says otherwise."""
    cfg_rescale: float = 0.0
    """Share, 0 to 1, of an output with the contrast of the unguided one, which large scales raise."""
    cfg_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Guidance over time: constant, or weak at first and strong towards the data, with --cfg-scale as its mean."""
    guide_workdir: str | None = None
    """Folder of a weaker run of the same data and process (smaller, or --guide-step of an early checkpoint), which
    guides instead of the network without labels (autoguidance)."""
    guide_step: int | None = None
    """Step of its checkpoint (default: the newest)."""
    seed: int = 0
    """Sample i is a function of (seed, i, label) alone."""
    out: str | None = None
    """PNG file for a grid of the pictures (default: WORKDIR/samples.png unless --npz is given)."""
    grid_count: int = 100
    """Pictures in the grid at most."""
    npz: str | None = None
    """.npz file for all pictures: arr_0 uint8 (N, H, W, 3), as the ADM evaluator reads it, and arr_1 labels."""
    batch_size: int = 128
    """Samples at once over all devices; does not change the pictures."""
    weights: Literal["ema", "params"] = "ema"
    """Averaged or raw weights."""
    step: int | None = None
    """Step of the checkpoint (default: the newest)."""
    vae: str | None = None
    """Where the autoencoder lies, if not where the dataset says: a diffusers folder or hub id."""
    compile_for: str | None = None
    """Only compile the sampling loop for TPUs that are not here, such as v5e:16x16, and print memory and estimated
    speed."""
    config: str | None = None
    """With --compile-for: a recipe in configs/ instead of a trained run."""


@dataclass(frozen=True)
class Run:
    """What a workdir says of its run."""

    workdir: pathlib.Path
    config: Config
    metadata: LatentMetadata


def load_run(workdir: str | os.PathLike[str], option: str = "--workdir") -> Run:
    """The config and the dataset's metadata of a folder that `option` names; ConfigError where it is no run's."""
    folder = pathlib.Path(workdir)
    config, metadata = run_config(option, folder), read_metadata(option, folder)
    if not 0 < metadata.image_size < 2**16:
        file = folder / "dataset.json"
        raise ConfigError(f"{file} has image_size {shown(metadata.image_size)}; expected 1 to {2**16 - 1}")
    return Run(folder, config, metadata)


def sampling_options(args: SampleArgs) -> SamplingOptions:
    """How latents are drawn; raises ConfigError for numbers out of range."""
    for option in ("num_samples", "batch_size", "grid_count"):
        if not 1 <= getattr(args, option) < 2**31:
            raise ConfigError(
                f"--{option.replace('_', '-')} is {getattr(args, option)}; expected 1 to {2**31 - 1}"
            )
    if not 0 <= args.seed < 2**31:
        raise ConfigError(f"--seed is {args.seed}; expected 0 to {2**31 - 1}")
    return SamplingOptions(
        args.sampler, args.steps, args.cfg_scale, args.cfg_channels, args.cfg_interval, args.eta,
        parse_grid(args.grid), args.grid_shift, args.cfg_rescale, args.cfg_schedule,
    )  # fmt: skip


def parse_grid(text: str | None) -> GridName | tuple[float, ...] | None:
    """A grid's name, or times such as 999,500,-1; ConfigError for what is neither."""
    if text is None or text in GRIDS:
        return cast(GridName | None, text)
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--grid is {shown(text)}; expected {', '.join(GRIDS)}, or times such as 999,500,-1"
        ) from None


def main(args: SampleArgs) -> int:
    """Draw the samples and write the files; everything that can be checked is checked first. The exit code."""
    options = sampling_options(args)
    if args.config:
        raise ConfigError(
            f"--config is {args.config}; expected only with --compile-for: a --workdir has its own"
        )
    run = load_run(args.workdir)
    config, model = run.config, sampling_model(run.config)
    named = model.condition.parse(args.labels, run.metadata.label_names)
    guide = None if args.guide_workdir is None else load_guide(args.guide_workdir, run)
    check_sampling(model, config, options, named, by_another=guide is not None)
    out = str(run.workdir / "samples.png") if args.out is None and args.npz is None else args.out
    _check_room(args, out, run, options)
    condition = {name: _repeat(values, args.num_samples) for name, values in named.items()}

    mesh = Mesh(np.array(jax.devices()), ("data",))
    params, step = _weights(run, mesh, args.weights, args.step)
    guide_model: DiT | None = None
    if guide is not None:
        guide_model = sampling_model(guide.config)
        params = (params, _weights(guide, mesh, args.weights, args.guide_step)[0])
    decoder = load_decoder(run.metadata, args.vae)
    counts: list[int] = []
    images = generate_images(
        model, params, config, options, condition, decoder, mesh, args.seed, args.batch_size,
        progress=True, told=counts.append, guide=guide_model,
    )  # fmt: skip
    if jax.process_index() != 0:
        return 0
    print(f"{max(counts)} evaluations of the network for each sample")
    if args.npz:
        save_samples(args.npz, images, condition["label"])
        print(f"{len(images)} pictures of step {step}: {args.npz}")
    if out:
        save_grid(out, images[: args.grid_count])
        print(f"grid of {min(len(images), args.grid_count)} pictures of step {step}: {out}")
    return 0


def load_guide(workdir: str, run: Run) -> Run:
    """The run in a folder that is to guide another one; ConfigError where it does not fit."""
    guide = load_run(workdir, "--guide-workdir")
    for what, ours, theirs in (
        ("process", run.config.diffusion, guide.config.diffusion),
        ("latents", run.config.model.input_size, guide.config.model.input_size),
        ("channels", run.config.model.in_channels, guide.config.model.in_channels),
        ("classes", run.config.model.num_classes, guide.config.model.num_classes),
    ):
        if ours != theirs:
            raise ConfigError(
                f"--guide-workdir {workdir} has other {what} ({shown(theirs)}) than --workdir {run.workdir} "
                f"({shown(ours)}); expected a run of the same"
            )
    return guide


def _weights(run: Run, mesh: Mesh, weights: Kind, step: int | None) -> tuple[Any, int]:
    """(parameters of the run, whole on every device, the step they are of)."""
    model, whole = sampling_model(run.config), NamedSharding(mesh, PartitionSpec())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(lambda key: init_params(model, run.config, key), jax.random.key(0)),
    )
    return load_weights(run.workdir / "checkpoints", like, run.config, weights, step)


def _repeat(values: np.ndarray, count: int) -> np.ndarray:
    """The first `count` of the values, repeated in turn."""
    return values[np.arange(count) % len(values)]


def _check_room(args: SampleArgs, out: str | None, run: Run, options: SamplingOptions) -> None:
    """Raises ConfigError where the pictures do not fit into memory, or the files cannot be written."""
    side, count = run.metadata.image_size, args.num_samples
    check_pictures("--num-samples", count, args.grid_count if out is not None else 0, side)
    check_batch(run.config, min(args.batch_size, count), options.cfg_scale != 1, len(jax.devices()))
    if out is not None and args.npz is not None and os.path.realpath(out) == os.path.realpath(args.npz):
        raise ConfigError(f"--out and --npz are both {out}; expected two files")
    if jax.process_index() == 0:
        for option, path, size in (("--npz", args.npz, picture_bytes(count, side)), ("--out", out, 0)):
            if path is not None:
                check_file(option, path, size)
