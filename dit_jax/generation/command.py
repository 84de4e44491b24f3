"""What sample.py does: the weights of a run, its samples, a PNG grid and an .npz."""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import Config, ConfigError, load, resolve, run_config
from dit_jax.config.saved import shown
from dit_jax.data.metadata import LatentMetadata
from dit_jax.diffusion.create import create_process
from dit_jax.evaluation.samples import save_samples
from dit_jax.files import check_file
from dit_jax.generation.editing import (
    SHOWN,
    Editing,
    encode,
    kept_part,
    make_way_sampler,
    read_picture,
    save_way,
    strip_of,
)
from dit_jax.generation.room import check_batch, check_pictures, picture_bytes
from dit_jax.generation.sampling import (
    SamplingOptions,
    check_sampling,
    device_mesh,
    generate_images,
    load_decoder,
    load_vae,
    make_decoder,
    sampling_model,
)
from dit_jax.interop.formats import is_run, read_weights
from dit_jax.interop.weights import Reading, Weights
from dit_jax.models.create import init_params
from dit_jax.models.dit import DiT
from dit_jax.pictures import save_grid
from dit_jax.runs.convert import metadata_of
from dit_jax.runs.weights import Kind, load_weights
from dit_jax.runs.workdir import read_metadata
from dit_jax.samplers.editing import Given
from dit_jax.samplers.grid import GRIDS, GridName
from dit_jax.samplers.table import SAMPLERS


@dataclass(frozen=True)
class SampleArgs:
    """Draw pictures from a trained run."""

    workdir: str = "runs/digits"
    """Folder of the run."""
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Instead of a run: a diffusers DiTPipeline (folder or hub id, such as facebook/DiT-XL-2-256), a published DiT or
    SiT (.pt), or a folder that convert.py wrote for the Hub."""
    process: Literal["dit", "sit"] | None = None
    """With --from FILE.pt: what its weights were trained as (default: what the file says, else dit)."""
    labels: list[str] = field(default_factory=list)
    """Classes by number or name, used in turn (default: all classes in turn); number:3 where 3 is a name as well."""
    num_samples: int = 64
    """How many pictures."""
    sampler: str | None = None
    """Name of a sampler, such as unipc_2 (the default, but ddim where --eta is given), ddpm (ancestral), dpmpp_2m,
    euler, heun or dopri5; a name that does not serve the run is answered with those that do."""
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
    interpolate: tuple[int, int] | None = None
    """Numbers of two samples of the first label: the pictures lie between their start noises, on an arc."""
    init_image: str | None = None
    """A picture to start from, noised, instead of from noise alone."""
    strength: float = 0.6
    """With --init-image: share of the steps that are taken, above 0 (the picture) to 1 (nothing is left of it)."""
    inpaint: tuple[str, str] | None = None
    """A mask and a picture: what is white in the mask is drawn anew, the rest of the picture stays."""
    trajectory: str | None = None
    """.gif file for the way of the first samples, the predicted picture beside the state; also as NAME_strip.png."""
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
    """With --compile-for: a recipe in configs/ instead of a trained run. With --from FILE.pt: the recipe of weights
    whose sizes are in no table."""


@dataclass(frozen=True)
class Run:
    """What a workdir says of its run."""

    workdir: pathlib.Path
    config: Config
    metadata: LatentMetadata
    weights: Weights | None = None
    """Other people's, where the folder is not that of a run."""


def load_run(workdir: str | os.PathLike[str], option: str = "--workdir") -> Run:
    """The config and the dataset's metadata of a folder that `option` names; ConfigError where it is no run's."""
    folder = pathlib.Path(workdir)
    config, metadata = run_config(option, folder), read_metadata(option, folder)
    if not 0 < metadata.image_size < 2**16:
        file = folder / "dataset.json"
        raise ConfigError(f"{file} has image_size {shown(metadata.image_size)}; expected 1 to {2**16 - 1}")
    return Run(folder, config, metadata)


def load_source(args: SampleArgs) -> Run:
    """What --from names, or else --workdir; pictures of other people's weights go to the working directory."""
    if args.source is None or is_run(args.source):
        wrong = [f"--{name}" for name in ("config", "process") if getattr(args, name) is not None]
        if wrong:
            raise ConfigError(
                f"{wrong[0]} is given; expected only with --from and published weights, or --compile-for"
            )
        return load_run(args.workdir) if args.source is None else load_run(args.source, "--from")
    if args.step is not None:
        raise ConfigError(
            f"--step is {args.step} with --from {args.source}, which has no steps; expected a run"
        )
    recipe = resolve(load(args.config)) if args.config else None
    # Pickles of files that hold both kinds of weights are the only ones with a choice.
    which: Kind | None = "params" if args.weights == "params" else None
    weights = read_weights(args.source, Reading(which, args.process, recipe, args.vae), "--from")
    return Run(pathlib.Path(), weights.config, metadata_of(weights), weights)


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
    run = load_source(args)
    config, model = run.config, sampling_model(run.config)
    named = model.condition.parse(args.labels, run.metadata.label_names)
    guide = None if args.guide_workdir is None else load_guide(args.guide_workdir, run)
    check_sampling(model, config, options, named, by_another=guide is not None)
    out = str(run.workdir / "samples.png") if args.out is None and args.npz is None else args.out
    _check_room(args, out, run, options)
    condition = {name: _repeat(values, args.num_samples) for name, values in named.items()}

    edits = _edits(args, SAMPLERS[options.choice(create_process(config.diffusion)).sampler].solver is None)
    mesh = device_mesh(1 if edits else None)
    params, step = _weights(run, mesh, args.weights, args.step)
    guide_model: DiT | None = None
    if guide is not None:
        guide_model = sampling_model(guide.config)
        params = (params, _weights(guide, mesh, args.weights, args.guide_step, "--guide-step")[0])
    if edits:
        images = _edited(args, run, options, model, params, condition, guide_model)
    else:
        counts: list[int] = []
        decoder = load_decoder(run.metadata, args.vae)
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
        # Between two samples the pictures are a row.
        save_grid(out, images[: args.grid_count], columns=args.grid_count if args.interpolate else None)
        print(f"grid of {min(len(images), args.grid_count)} pictures of step {step}: {out}")
    return 0


def _edits(args: SampleArgs, adaptive: bool) -> bool:
    """Whether samples are to be edited or shown on their way; ConfigError for what cannot be asked together."""
    starts = {"--interpolate": args.interpolate, "--init-image": args.init_image, "--inpaint": args.inpaint}
    asked = [option for option, value in starts.items() if value is not None]
    if len(asked) > 1:
        raise ConfigError(f"{asked[0]} and {asked[1]} are both given; expected one of them")
    if not 0 < args.strength <= 1:
        raise ConfigError(f"--strength is {args.strength}; expected above 0 and up to 1")
    if args.interpolate and not all(0 <= i < 2**31 for i in args.interpolate):
        raise ConfigError(
            f"--interpolate is {args.interpolate}; expected two numbers of samples, 0 to {2**31 - 1}"
        )
    if args.trajectory is not None:
        asked.append("--trajectory")
        if not args.trajectory.endswith(".gif"):
            raise ConfigError(f"--trajectory is {args.trajectory}; expected a file that ends with .gif")
        strip = strip_of(args.trajectory)
        if args.out is not None and os.path.realpath(args.out) == os.path.realpath(strip):
            raise ConfigError(
                f"--out is {args.out}, where --trajectory puts its strip; expected another file"
            )
        check_file("--trajectory", args.trajectory, 0)
    if asked and adaptive:
        raise ConfigError(
            f"--sampler is {args.sampler}, whose steps are its own; expected another with {asked[0]}"
        )
    if asked and jax.process_count() > 1:
        raise ConfigError(f"{asked[0]} in a run of {jax.process_count()} processes; expected one process")
    if asked and args.num_samples > args.batch_size:
        raise ConfigError(
            f"--num-samples is {args.num_samples} with {asked[0]}; expected at most --batch-size {args.batch_size}"
        )
    return bool(asked)


def _edited(
    args: SampleArgs,
    run: Run,
    options: SamplingOptions,
    model: DiT,
    params: Any,
    condition: Any,
    guide: DiT | None,
) -> np.ndarray:
    """Pictures (N, h, w, 3) uint8, as asked for, in one batch; writes the way of --trajectory."""
    metadata, count = run.metadata, args.num_samples
    scale = {"scaling": metadata.scaling_factor, "shift": metadata.shift_factor}
    vae, vae_params = load_vae(metadata, args.vae)
    given, stays = None, None
    if args.init_image is not None:
        picture = read_picture("--init-image", args.init_image, metadata.image_size)
        given = Given(encode(vae, vae_params, picture, **scale))
    elif args.inpaint is not None:
        mask, picture = (read_picture("--inpaint", path, metadata.image_size) for path in args.inpaint)
        keep = kept_part(mask, run.config.model.input_size)
        given = Given(encode(vae, vae_params, picture, **scale), jnp.asarray(keep))
        stays = (mask.mean(axis=-1) <= 127.5, picture)
    if args.interpolate is not None:
        condition = {name: np.repeat(values[:1], count, axis=0) for name, values in condition.items()}
    editing = Editing(args.interpolate, args.strength if args.init_image is not None else 1.0)
    sampler = make_way_sampler(model, run.config, options, editing, guide)
    found = sampler(params, args.seed, np.arange(count, dtype=np.int32), condition, given)
    if not np.isfinite(latents := np.asarray(found.states[-1])).all():
        raise FloatingPointError("the samples hold values that are not finite")
    decoder = make_decoder(vae, vae_params, metadata.scaling_factor, metadata.shift_factor)
    images = decoder(latents)
    if stays is not None:
        images = np.where(stays[0][None, :, :, None], stays[1][None], images)
    if args.trajectory is not None:
        print(
            f"the way of {min(count, SHOWN)} samples: {args.trajectory}, {save_way(args.trajectory, found, decoder)}"
        )
    return images


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


def _weights(
    run: Run, mesh: Mesh, weights: Kind, step: int | None, option: str = "--step"
) -> tuple[Any, int]:
    """(parameters of the run, whole on every device, the step they are of)."""
    model, whole = sampling_model(run.config), NamedSharding(mesh, PartitionSpec())
    if run.weights is not None:
        return jax.device_put(run.weights.params, whole), run.weights.step
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(lambda key: init_params(model, run.config, key), jax.random.key(0)),
    )
    return load_weights(run.workdir / "checkpoints", like, run.config, weights, step, option)


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
