"""What the commands that draw samples can be asked: the options of their drawing, checked and read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast

import tyro

from dit_jax.config import ConfigError
from dit_jax.config.saved import shown
from dit_jax.generation.sampling import SamplingOptions
from dit_jax.samplers.grid import GRIDS, GridName


@dataclass(frozen=True)
class DrawArgs:
    """How samples are drawn."""

    labels: list[str] = field(default_factory=list)
    """Classes by number or name (default: all classes); number:3 where 3 is a name as well."""
    label_order: Literal["in-turn", "random"] = "in-turn"
    """in-turn: the classes, or prompts, one after the other, each as often; random: each sample's is drawn, by
    (seed, i)."""
    prompt: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Of a run that is told captions: what to show; given again for each of several."""
    prompts: str | None = None
    """The same out of a file: text with a prompt a line, a .jsonl with a prompt in each record (GenEval's), or a
    folder with a .txt for each (DPG-Bench's)."""
    negative_prompt: str | None = None
    """What guidance leads away from (default: an empty caption, as the network was trained)."""
    text_encoder: str | None = None
    """Where the encoder of captions lies, if not where the dataset says: a folder or hub id."""
    sampler: str | None = None
    """Name of a sampler, such as unipc_2 (the default, but ddim where --eta is given), ddpm (ancestral), dpmpp_2m,
    euler, heun or dopri5; a name that does not serve the run is answered with those that do."""
    steps: int = 50
    """Sampling steps."""
    eta: float = 0.0
    """Noise of DDIM: 0 deterministic, 1 like DDPM."""
    grid: str | None = None
    """Where the sampler stops: uniform, respaced (whole timesteps, for ddpm and ddim), lambda, karras, quadratic,
    shifted, sd3, or the times themselves from noise to data, such as 999,700,300,-1 (default: the sampler's own)."""
    grid_shift: float = 3.0
    """Of --grid shifted and sd3: above 1 more steps are near the noise."""
    cfg_channels: int | Literal["all"] = "all"
    """Latent channels that are guided: all, or the first few (the published DiT sampler: 3)."""
    cfg_interval: tuple[int, int] | tuple[float, float] | None = None
    """Lowest and highest time, as the network is shown it, with guidance (default: everywhere): timesteps of a
    Gaussian run, under flow matching 0 (noise) to 1 (data) unless the recipe says otherwise."""
    cfg_rescale: float = 0.0
    """Share, 0 to 1, of an output with the contrast of the unguided one, which large scales raise."""
    cfg_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Guidance over time: constant, or weak at first and strong towards the data, with --cfg-scale as its mean."""
    skip_layers: list[int] = field(default_factory=list)
    """Skip-layer guidance: blocks, counted from 0, without which the network is asked once more in some steps, to be
    led away from (Stable Diffusion 3.5 medium: 7 8 9)."""
    skip_layer_scale: float = 2.5
    """Its scale, beside --cfg-scale."""
    skip_layer_interval: tuple[float, float] = (0.01, 0.2)
    """The steps that have it, as shares of all: those between the two."""
    guide_workdir: str | None = None
    """Folder of a weaker run of the same data and process (smaller, or --guide-step of an early checkpoint), which
    guides instead of the network without labels (autoguidance)."""
    guide_step: int | None = None
    """Step of its checkpoint (default: the newest)."""
    seed: int = 0
    """Sample i is a function of (seed, i, label) alone."""
    batch_size: int = 128
    """Samples at once over all devices; does not change the pictures."""
    decode_batch: int | None = None
    """Pictures that the autoencoder decodes at once on a device (default: as many as fit)."""
    weights: Literal["ema", "params"] = "ema"
    """Averaged or raw weights."""
    step: int | None = None
    """Step of the checkpoint (default: the newest)."""
    vae: str | None = None
    """Where the autoencoder lies, if not where the dataset says: a diffusers folder or hub id."""


def drawing(args: DrawArgs, cfg_scale: float) -> SamplingOptions:
    """How latents are drawn; raises ConfigError for numbers out of range."""
    check_range("--batch-size", args.batch_size)
    if args.decode_batch is not None:
        check_range("--decode-batch", args.decode_batch)
    if not 0 <= args.seed < 2**31:
        raise ConfigError(f"--seed is {args.seed}; expected 0 to {2**31 - 1}")
    return SamplingOptions(
        args.sampler, args.steps, cfg_scale, args.cfg_channels, args.cfg_interval, args.eta,
        parse_grid(args.grid), args.grid_shift, args.cfg_rescale, args.cfg_schedule, tuple(args.skip_layers),
        args.skip_layer_scale, args.skip_layer_interval,
    )  # fmt: skip


def check_range(option: str, value: int) -> None:
    """Raises ConfigError, naming the option, where `value` is no number of things."""
    if not 1 <= value < 2**31:
        raise ConfigError(f"{option} is {value}; expected 1 to {2**31 - 1}")


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
