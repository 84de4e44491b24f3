"""sample.py's pictures between two samples, from a picture and around a part of one, and their way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import paths
from dit_jax.config import ConfigError
from dit_jax.files import check_file
from dit_jax.generation.decoding import load_vae, make_decoder
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
from dit_jax.generation.sampling import SamplingOptions, Told
from dit_jax.models.create import Model
from dit_jax.samplers.editing import Given

if TYPE_CHECKING:
    from dit_jax.generation.command import Run, SampleArgs


def edits_asked(args: SampleArgs, adaptive: bool) -> bool:
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
        if args.out is not None and paths.real(args.out) == paths.real(strip):
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


def edited_images(
    args: SampleArgs,
    run: Run,
    options: SamplingOptions,
    model: Model,
    params: Any,
    told: Told,
    guide: Model | None,
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
        first = {name: np.repeat(values[:1], count, axis=0) for name, values in told.condition.items()}
        told = told._replace(condition=first)
    editing = Editing(args.interpolate, args.strength if args.init_image is not None else 1.0)
    told = told._replace(condition=jax.tree.map(np.asarray, told.condition))
    sampler = make_way_sampler(model, run.config, options, editing, guide)
    found = sampler(params, args.seed, np.arange(count, dtype=np.int32), told, given)
    if not np.isfinite(latents := np.asarray(found.states[-1])).all():
        raise FloatingPointError("the samples hold values that are not finite")
    decoder = make_decoder(vae, vae_params, metadata.scaling_factor, metadata.shift_factor)
    images = np.asarray(decoder(latents))
    if stays is not None:
        images = np.where(stays[0][None, :, :, None], stays[1][None], images)
    if args.trajectory is not None:
        print(
            f"the way of {min(count, SHOWN)} samples: {args.trajectory}, {save_way(args.trajectory, found, decoder)}"
        )
    return images
