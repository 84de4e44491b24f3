"""What sample.py does: the weights of a run, its samples, a PNG grid and an .npz."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax import paths
from dit_jax.config import Config, ConfigError, load, resolve, run_config
from dit_jax.config.saved import shown
from dit_jax.data.metadata import LatentMetadata
from dit_jax.diffusion.create import create_process
from dit_jax.evaluation.samples import Provenance, save_samples, write_samples
from dit_jax.files import check_file
from dit_jax.generation.decoding import load_decoder
from dit_jax.generation.edited import edited_images, edits_asked
from dit_jax.generation.options import DrawArgs, check_range, drawing
from dit_jax.generation.parts import Parts, held_bytes, parts_of
from dit_jax.generation.prompts import Asked, asked_of, check_asked
from dit_jax.generation.room import check_batch, check_pictures, picture_bytes
from dit_jax.generation.sampling import (
    SamplingOptions,
    Told,
    device_mesh,
    generate_images,
    sampling_model,
)
from dit_jax.generation.stream import Source, draw, on_own_devices
from dit_jax.interop.formats import is_run, read_weights
from dit_jax.interop.weights import Reading, Weights
from dit_jax.models import cost
from dit_jax.models.create import Model, init_params
from dit_jax.pictures import save_grid
from dit_jax.processes import agree, on_lead
from dit_jax.runs.checkpoint import CHECKSUMS
from dit_jax.runs.convert import metadata_of
from dit_jax.runs.weights import Kind, load_weights
from dit_jax.runs.workdir import read_metadata
from dit_jax.samplers.table import SAMPLERS

NOT_DECIDING = {"batch_size", "decode_batch", "vae", "prompt", "out", "grid_count", "npz", "compile_for"}
"""Options that do not change the samples."""


@dataclass(frozen=True)
class SampleArgs(DrawArgs):
    """Draw pictures from a trained run."""

    workdir: str = "runs/digits"
    """Folder of the run."""
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Instead of a run: a diffusers DiTPipeline or StableDiffusion3Pipeline (folder or hub id, such as
    facebook/DiT-XL-2-256), a published DiT or SiT (.pt) or Stable Diffusion 3 (.safetensors), or a
    folder that convert.py wrote for the Hub."""
    process: Literal["dit", "sit"] | None = None
    """With --from FILE.pt: what its weights were trained as (default: what the file says, else dit)."""
    num_samples: int = 64
    """How many pictures."""
    cfg_scale: float = 1.5
    """Guidance scale; 1 for none."""
    size: str | None = None
    """Height and width of the latents, such as 24x40, of those on which the run was trained (default: its
    --model.input-size)."""
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
    out: str | None = None
    """PNG file for a grid of the pictures (default: WORKDIR/samples.png unless --npz is given)."""
    grid_count: int = 100
    """Pictures in the grid at most."""
    npz: str | None = None
    """.npz file for all pictures: arr_0 uint8 (N, H, W, 3), as the ADM evaluator reads it, and arr_1 labels, or
    prompts. They are gathered in NPZ.parts until all are there: the same command goes on with them."""
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

    @property
    def place(self) -> str:
        """What its weights are called in what is written of them."""
        return str(self.workdir) if self.weights is None else self.weights.source


def load_run(workdir: paths.Named, option: str = "--workdir") -> Run:
    """The config and the dataset's metadata of a folder that `option` names; ConfigError where it is no run's."""
    folder = paths.to_path(workdir)
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
    check_range("--num-samples", args.num_samples)
    check_range("--grid-count", args.grid_count)
    return drawing(args, args.cfg_scale)


def main(args: SampleArgs) -> int:
    """Draw the samples and write the files; everything that can be checked is checked first. The exit code."""
    options = sampling_options(args)
    run = load_source(args)
    size = size_asked(args, run.config)
    model = sampling_model(run.config, size)
    asked = asked_of(args, run, model)
    guide = None if args.guide_workdir is None else load_guide(args.guide_workdir, run)
    check_asked(model, run, options, asked, guide)
    out = str(run.workdir / "samples.png") if args.out is None and args.npz is None else args.out
    choice = options.choice(create_process(run.config.diffusion))
    edits = edits_asked(args, SAMPLERS[choice.sampler].solver is None)
    # Without an .npz nobody sees more than the grid; whole batches, whose pictures are the same to the bit.
    count = args.num_samples
    if args.npz is None and not edits:
        count = min(count, -(-args.grid_count // args.batch_size) * args.batch_size)
    _check_room(args, out, run, options, count, size)
    asked = asked.embedded(model.condition)
    rows = asked.rows(args, count)
    if args.interpolate is not None:
        rows = np.full_like(rows, rows[0])
    condition, captions = asked.conditions(rows), asked.captions_of(rows)

    mesh = device_mesh(1 if edits else None)
    params, guide_model, steps = networks(args, run, guide, mesh, size)
    if edits:
        told = Told(condition, asked.null)
        images = edited_images(args, run, options, model, params, told, guide_model)
    else:
        decoder = load_decoder(run.metadata, args.vae, args.decode_batch)
        source = Source(
            model,
            params,
            run.config,
            options,
            condition,
            decoder,
            mesh,
            args.seed,
            args.batch_size,
            guide_model,
            asked.null,
        )
        if args.npz:
            _stream(args, run, source, steps, out, asked)
            return 0
        counts: list[int] = []
        images = generate_images(
            model, params, run.config, options, condition, decoder, mesh, args.seed, args.batch_size,
            progress=True, told=counts.append, guide=guide_model, null=asked.null,
        )  # fmt: skip
        if jax.process_index() != 0:
            return 0
        print(f"{max(counts)} evaluations of the network for each sample")
    if args.npz:
        came_from = provenance(args, run, options, steps["step"], asked)
        save_samples(args.npz, images, condition.get("label"), came_from, captions)
        print(f"{len(images)} pictures of step {steps['step']}: {args.npz}")
    _write_grid(args, out, images, steps["step"], captions)
    return 0


def size_asked(args: SampleArgs, config: Config) -> tuple[int, int]:
    """Height and width of the latents; raises ConfigError for those that the run has not seen."""
    sizes = {
        f"{height}x{width}": (height, width)
        for height, width in (config.model.input_size, *config.data.sizes)
    }
    if args.size is None:
        return config.model.input_size
    if args.size not in sizes:
        raise ConfigError(
            f"--size is {shown(args.size)}; expected {' or '.join(sizes)}, of which the run was trained"
        )
    for option, value in (("--init-image", args.init_image), ("--inpaint", args.inpaint)):
        if value is not None and sizes[args.size] != config.model.input_size:
            raise ConfigError(
                f"--size is {args.size} with {option}; expected the run's own size, which pictures are cut to"
            )
    return sizes[args.size]


def networks(
    args: DrawArgs, run: Run, guide: Run | None, mesh: Mesh, size: tuple[int, int] | None = None
) -> tuple[Any, Model | None, dict[str, Any]]:
    """(parameters on a mesh, the guide's network of this size, the steps that both are of, by option).

    With a guide the parameters are a pair, as `make_latent_sampler` takes them.
    """
    params, step = _weights(run, mesh, args.weights, args.step)
    if guide is None:
        return params, None, {"step": step, "guide_step": None}
    theirs, guide_step = _weights(guide, mesh, args.weights, args.guide_step, "--guide-step")
    return (params, theirs), sampling_model(guide.config, size), {"step": step, "guide_step": guide_step}


def provenance(args: DrawArgs, run: Run, options: SamplingOptions, step: int, asked: Asked) -> Provenance:
    """Where samples of these options come from."""
    guidance: dict[str, Any] = {
        "scale": options.cfg_scale, "channels": options.channels, "interval": options.interval,
        "rescale": options.rescale, "schedule": options.schedule, "by": args.guide_workdir,
    }  # fmt: skip
    if options.skip_layers:
        guidance["skip_layers"] = [list(options.skip_layers), options.skip_scale, options.skip_interval]
    sampler = options.choice(create_process(run.config.diffusion)).sampler
    return Provenance(
        run.place,
        step,
        args.weights,
        sampler,
        options.steps,
        guidance,
        args.seed,
        run.config.compute.dtype,
        list(dict.fromkeys(asked.captions)) or None,
        asked.negative,
    )


def recipe(args: DrawArgs, run: Run, steps: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """All that decides the samples of these options, by option."""
    folders = {"workdir": paths.real(run.workdir)}
    if args.guide_workdir is not None:
        folders["guide_workdir"] = paths.real(args.guide_workdir)
    checksums = run.workdir / "checkpoints" / str(steps["step"]) / CHECKSUMS
    of_files = hashlib.sha256(checksums.read_bytes()).hexdigest()[:12] if paths.is_file(checksums) else None
    if run.weights is not None:
        of_files = run.weights.digest()[:12]
    decides = {name: value for name, value in dataclasses.asdict(args).items() if name not in NOT_DECIDING}
    if decides.get("size", "") is None:
        del decides["size"]
    if not args.skip_layers:
        decides = {name: value for name, value in decides.items() if not name.startswith("skip_layer")}
    return decides | folders | steps | {
        "checkpoint": of_files, "autoencoder": run.metadata.vae_hash[:12], "dtype": run.config.compute.dtype,
        "prompts": list(asked.captions) or None, "text_encoder": asked.fingerprint[:12] or None,
    }  # fmt: skip


def _stream(
    args: SampleArgs, run: Run, source: Source, steps: dict[str, Any], out: str | None, asked: Asked
) -> None:
    """Draw all samples into parts; process 0 makes the files of them."""
    assert args.npz is not None
    folder, count, step = parts_of(args.npz), args.num_samples, steps["step"]
    with Parts("--npz", folder, recipe(args, run, steps, asked), count) as parts:
        evaluations = draw(on_own_devices(source), parts, lambda images: {"images": images}, progress=True)
        agree()
        if jax.process_index() != 0:
            return
        if evaluations:
            print(f"{evaluations} evaluations of the network for each sample")
        blocks = (part["images"] for part in parts.read())
        came_from = provenance(args, run, source.options, step, asked)
        captions = asked.captions_of(asked.rows(args, count))
        write_samples(args.npz, blocks, source.condition.get("label"), came_from, captions)
        print(f"{count} pictures of step {step}: {args.npz}")
        if out:
            images = np.concatenate([part["images"] for part in parts.read(args.grid_count)])
            _write_grid(args, out, images, step, captions)
        parts.remove()


def _write_grid(
    args: SampleArgs, out: str | None, images: np.ndarray, step: int, captions: list[str] | None
) -> None:
    if out:
        images = images[: args.grid_count]
        columns = args.grid_count if args.interpolate else None  # between two samples the pictures are a row
        save_grid(out, images, columns, captions and captions[: len(images)])
        print(f"grid of {len(images)} pictures of step {step}: {out}")


def load_guide(workdir: str, run: Run) -> Run:
    """The run in a folder that is to guide another one; ConfigError where it does not fit."""
    guide = load_run(workdir, "--guide-workdir")
    for what, ours, theirs in (
        ("process", run.config.diffusion, guide.config.diffusion),
        ("latents", run.config.model.input_size, guide.config.model.input_size),
        ("sizes", sorted(run.config.data.sizes), sorted(guide.config.data.sizes)),
        ("channels", run.config.model.in_channels, guide.config.model.in_channels),
        ("classes", run.config.model.num_classes, guide.config.model.num_classes),
        ("captions", *(_captions(one.config) for one in (run, guide))),
    ):
        if ours != theirs:
            raise ConfigError(
                f"--guide-workdir {workdir} has other {what} ({shown(theirs)}) than --workdir {run.workdir} "
                f"({shown(ours)}); expected a run of the same"
            )
    return guide


def _captions(config: Config) -> tuple[Any, ...]:
    """What decides a caption's condition."""
    text = config.text
    return text.encoder, text.length, text.channels, text.pooled


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


def _check_room(
    args: SampleArgs, out: str | None, run: Run, options: SamplingOptions, count: int, size: tuple[int, int]
) -> None:
    """Raises ConfigError where the pictures do not fit into memory, or the files cannot be written."""
    # Of a square with as many pixels.
    side = math.ceil(
        run.metadata.image_size * math.sqrt(math.prod(size) / math.prod(run.config.model.input_size))
    )
    in_grid = args.grid_count if out is not None else 0
    if args.npz is None:
        check_pictures("--num-samples", count, in_grid, side)
    else:
        check_pictures("--batch-size", min(args.batch_size, count), 0, side)
        check_pictures("--grid-count", min(in_grid, count), in_grid, side)
    check_batch(
        cost.of_size(run.config, size),
        min(args.batch_size, count),
        options.cfg_scale != 1,
        len(jax.devices()),
    )
    if out is not None and args.npz is not None and paths.real(out) == paths.real(args.npz):
        raise ConfigError(f"--out and --npz are both {out}; expected two files")

    def check_files() -> None:
        if args.npz is not None:
            check_file("--npz", args.npz, 2 * picture_bytes(count, side) - held_bytes(parts_of(args.npz)))
        if out is not None:
            check_file("--out", out, 0)

    on_lead(check_files)
