"""Encode images into a latent dataset, or inspect one."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from dit_jax import paths, signals
from dit_jax.commands import EXIT_BAD_OPTION


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Encode images into a latent dataset. A killed run goes on where it was when started again.

    With `inspect DIR` instead of options it checks a finished dataset and draws a sheet of samples.
    """

    source: str
    """Where images come from: digits, digits-text (two digits and a caption), folder:PATH (a subfolder per class, or
    unlabelled), npz:PATH (images, labels), tar:PATH (webdataset's shards: a file, a folder or a pattern), tfds:NAME
    or tfds:PATH (features image and label, for example tfds:imagenet2012)."""
    out: str
    """Folder of the dataset."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """Autoencoder in diffusers' format: a folder, a hub id, or `digits` for the small one that ships along."""
    image_size: int = 256
    """Side of the square crop, pixels; a multiple of the VAE's factor."""
    mirrors: bool = True
    """Store the moments of the mirror image too, so that training can draw either."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored moments."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute precision of the encoder."""
    vae_backend: Literal["flax", "diffusers"] = "flax"
    """Our Flax port, or diffusers' torch class where it is installed."""
    batch_size: int = 32
    """Images that one device encodes at once."""
    shard_size: int = 4096
    """Images in a shard, the unit of shared and of resumed work."""
    skip_bad: bool = False
    """Leave out images that cannot be decoded and list them in the metadata, instead of stopping."""
    workers: int = max(1, (os.cpu_count() or 2) - 1)
    """Processes that decode and resize."""
    split: str = "train"
    """Split of a TFDS dataset or of the digits."""
    tfds_data_dir: str | None = None
    """Where TFDS keeps its datasets (None: TFDS' own default)."""
    captions: Literal["auto", "none"] = "auto"
    """auto: captions are stored where the source has them: .txt files or metadata.jsonl or .csv beside pictures, .txt
    or .json in tar files, and of a TFDS dataset the feature --caption-field."""
    caption_field: str = ""
    """Where captions stand: a column of a metadata file, a key of a tar file's .json, a feature of a TFDS dataset
    such as captions/text (empty: text, caption or captions; of TFDS none)."""
    text_encoder: tuple[str, ...] = ()
    """Who embeds captions: sd3, or a Hugging Face hub id or folder; a second word says where the files of sd3 lie, a
    folder or hub id of a StableDiffusion3Pipeline (none, or bytes: words alone are stored)."""
    text_length: int | None = None
    """Tokens of a caption at most (None: 77 of CLIP and 256 of T5 for sd3, 256 of a language model)."""
    text_dtype: Literal["float16", "bfloat16"] = "bfloat16"
    """Type of the stored embeddings."""
    process_index: int = 0
    """Which of the processes this is; they share the work by shards and see the same folder."""
    process_count: int = 1
    """How many processes share the work."""
    distributed: bool = False
    """Take index and count from jax.distributed, as launched on a TPU pod or under SLURM."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Print a dataset's metadata, check every record and write a PNG of decoded samples."""

    dir: Annotated[str, tyro.conf.Positional]
    """Folder of the dataset."""
    out: str | None = None
    """The PNG (None: beside the folder, under its name)."""
    vae: str = ""
    """Where the autoencoder lies now (empty: where the metadata says)."""
    count: int = 32
    """Records in the PNG."""


def prepare(args: Prepare) -> None:
    """Encode, and print what came out."""
    # Processes that pick convolution kernels by timing them would not write equal bytes.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    import jax

    from dit_jax.compiler import keep_compiled_programs
    from dit_jax.data import encode, encoders, sources
    from dit_jax.data.embed import open_embedder
    from dit_jax.data.inspection import describe
    from dit_jax.data.metadata import DataError

    keep_compiled_programs()
    if args.source in ("digits", "digits-text") and args.mirrors:
        raise DataError(
            f"--mirrors is on, but a mirrored digit is none; expected --no-mirrors with --source {args.source}"
        )
    if len(args.text_encoder) > 2:
        raise DataError(
            f"--text-encoder is {' '.join(args.text_encoder)}; expected an encoder, and where it lies if need be"
        )
    index, count = args.process_index, args.process_count
    if args.distributed:
        jax.distributed.initialize()
        index, count = jax.process_index(), jax.process_count()
    source = sources.open_source(
        args.source, args.split, args.tfds_data_dir, args.captions == "auto", args.caption_field
    )
    name, place = (*args.text_encoder, "", "")[:2]
    if name and not source.has_captions:
        raise DataError(
            f"--text-encoder is {name}, but {source.name} has no captions; expected a source that has"
        )
    embedder = open_embedder(name, place or None, args.text_length, args.text_dtype)
    make = encoders.diffusers_encoder if args.vae_backend == "diffusers" else encoders.flax_encoder
    encoder = make(args.vae, args.precision)
    with signals.interruptible():  # workers and unfinished shards go away
        metadata = encode.prepare(
            source,
            encoder,
            args.out,
            image_size=args.image_size,
            mirrors=args.mirrors,
            dtype=args.dtype,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
            skip_bad=args.skip_bad,
            workers=args.workers,
            process_index=index,
            process_count=count,
            embedder=embedder,
        )
    print(
        f"{paths.to_path(args.out)}: "
        + (f"done\n{describe(metadata)}" if metadata else "waiting for other processes' shards")
    )


def inspect(args: Inspect) -> None:
    """Check the dataset, and draw it."""
    from dit_jax.compiler import keep_compiled_programs
    from dit_jax.data import inspection
    from dit_jax.data.latents import LatentDataset
    from dit_jax.data.metadata import DataError
    from dit_jax.files import check_file

    if args.count < 1:
        raise DataError(f"--count is {args.count}; expected 1 or more")
    keep_compiled_programs()
    dataset = LatentDataset(args.dir)
    folder = dataset.directory
    sheet = paths.to_path(args.out) if args.out else folder.with_name(f"{folder.name}.png")
    check_file("--out", sheet)
    print(inspection.describe(dataset.metadata))
    inspection.check(dataset)
    print("every record is as the metadata says")
    inspection.sample_sheet(dataset, sheet, args.vae, args.count)
    print(f"samples: {sheet}")


def main(program: str, args: Sequence[str]) -> int:
    """Exit code 0 when done, 2 for a bad option, source or dataset, 130 when interrupted by Ctrl-C."""
    from dit_jax.config import ConfigError

    try:
        if args[:1] == ["inspect"]:
            inspect(tyro.cli(Inspect, args=args[1:], prog=f"{program} inspect"))
        else:
            prepare(tyro.cli(Prepare, args=args, prog=program))
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_BAD_OPTION
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on", file=sys.stderr)
        return signals.EXIT_INTERRUPTED
    return 0
