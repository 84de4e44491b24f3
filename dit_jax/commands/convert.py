"""Turn weights of one format into another."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from dit_jax import signals
from dit_jax.commands import EXIT_BAD_OPTION
from dit_jax.config import ConfigError, load, resolve


@dataclass(frozen=True)
class ConvertArgs:
    """Turn weights of one format into another; the autoencoder of latent diffusion into diffusers' format."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="IN")]
    """A run, a published DiT or SiT (.pt) or Stable Diffusion 3 (.safetensors), a diffusers DiTPipeline or
    StableDiffusion3Pipeline (folder or hub id), a folder of ours, or the autoencoder of latent diffusion (.ckpt, .pt
    or .safetensors)."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="OUT")]
    """A new file or folder."""
    to: Literal["run", "pt", "diffusers", "folder", "lora"] | None = None
    """Format of OUT: run (what train.py leaves), pt (published), diffusers, folder (ours, for the Hub), lora (a
    .safetensors file of the low-rank adaptation alone, for diffusers; other formats have it in the weights).
    Default: pt where OUT ends with .pt, else folder for a run and run for anything else."""
    weights: Literal["ema", "params"] | None = None
    """Averaged (the default) or raw weights, of what holds both."""
    step: int | None = None
    """Step of a run's checkpoint (default: the newest)."""
    process: Literal["dit", "sit"] | None = None
    """What published weights were trained as (default: what the file says, else dit)."""
    config: str | None = None
    """A recipe of published weights whose sizes are in no table."""
    vae: str | None = None
    """Where the autoencoder lies, if not where IN says: a diffusers folder or hub id."""
    scaling_factor: float | None = None
    """Of an autoencoder's file: what brings its latents to unit variance (default: as it says, or 0.18215)."""


def main(program: str, args: Sequence[str]) -> int:
    """Exit code 0: written; 2: bad option, file or folder; 130: interrupted, and nothing is left."""
    description = f"{ConvertArgs.__doc__}\n\n{program} facebook/DiT-XL-2-256 runs/dit_xl2"
    options = tyro.cli(ConvertArgs, args=args, prog=program, description=description)
    from dit_jax.interop.weights import Reading
    from dit_jax.runs.convert import convert

    try:
        config = resolve(load(options.config)) if options.config else None
        reading = Reading(options.weights, options.process, config, options.vae, options.step)
        with signals.interruptible():
            print(convert(options.source, options.out, options.to, reading, options.scaling_factor))
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_BAD_OPTION
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return signals.EXIT_INTERRUPTED
    return 0
