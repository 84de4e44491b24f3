"""From trained weights to pictures: batches of samples over all devices, decoded by the VAE.

Sample i of a seed is a pure function of (seed, i, label): the batch size and the number of devices do not
change it.

Letters: B samples in a batch, N samples in all, H and W latent sides, C latent channels.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from dit_jax.compiler import compiler_options
from dit_jax.conditions import AnyCondition, Condition
from dit_jax.config import Config, ConfigError
from dit_jax.config.check import FLOAT32_MOST
from dit_jax.data.metadata import LatentMetadata
from dit_jax.diffusion.create import create_process
from dit_jax.diffusion.guidance import SCHEDULES, Skipping, autoguidance, classifier_free_guidance
from dit_jax.diffusion.process import DenoiseFn, Network, Process
from dit_jax.diffusion.samplers import sample_keys, start_noise
from dit_jax.generation.decoding import Decoder, check_decoder, load_decoder
from dit_jax.generation.decoding import load_vae as load_vae
from dit_jax.generation.decoding import make_decoder as make_decoder
from dit_jax.generation.room import check_pictures
from dit_jax.models.compute import unrolls
from dit_jax.models.create import Model, build_model
from dit_jax.models.lora import merged
from dit_jax.pictures import save_grid
from dit_jax.processes import all_fail_alike
from dit_jax.samplers.grid import GridName
from dit_jax.samplers.table import DEFAULT, Choice, plan
from dit_jax.samplers.table import sample as draw_samples

Array = jax.Array


class Told(NamedTuple):
    """What the network is told of samples: the condition of B of them, and of one what stands in its place under
    guidance (None: the network's own null)."""

    condition: Any
    null: Condition | None = None


@dataclass(frozen=True)
class SamplingOptions:
    """How latents are drawn.

    Attributes: `sampler` a name in `dit_jax.samplers.table`, None for the process's default; `channels`, `interval`
    and `rescale` as in `classifier_free_guidance`, `schedule` a name in `guidance.SCHEDULES`; `eta` is DDIM's; `grid`
    and `grid_shift` as in `Choice`; `skip_layers` are blocks, counted from 0, without which the network guides as
    well, at `skip_scale` and in the steps of which `skip_interval` names the shares of all.
    """

    sampler: str | None = None
    steps: int = 50
    cfg_scale: float = 1.0
    channels: Literal["all"] | int = "all"
    interval: tuple[float, float] | None = None
    eta: float = 0.0
    grid: GridName | tuple[float, ...] | None = None
    grid_shift: float = 3.0
    rescale: float = 0.0
    schedule: str = "constant"
    skip_layers: tuple[int, ...] = ()
    skip_scale: float = 2.5
    skip_interval: tuple[float, float] = (0.01, 0.2)

    def guided(
        self, process: Process, kind: AnyCondition, told: Told, network: Network, guide: Network | None,
        without_layers: Network | None = None,
    ) -> DenoiseFn:  # fmt: skip
        """The network of these samples, drawn away from `guide`, or from itself without a condition."""
        condition, null = told
        share = SCHEDULES[self.schedule]
        how: dict[str, Any] = {
            "scale": self.cfg_scale, "channels": self.channels, "interval": self.interval, "rescale": self.rescale,
            "schedule": share and (lambda shown: share(process.shown_noise_level(shown))),
        }  # fmt: skip
        if without_layers is not None and (times := self._skip_times(process)) is not None:
            how["skipping"] = Skipping(without_layers, self.skip_scale, times)
        if guide is not None:
            return autoguidance(network, guide, kind.tree(condition), **how)
        return classifier_free_guidance(
            network, kind.tree(condition), kind.null if null is None else null, **how
        )

    def _skip_times(self, process: Process) -> tuple[float, float] | None:
        """Lowest and highest time, as the network is shown it, with skip-layer guidance; None if no step has it."""
        course, _, times = plan(process, self.choice(process))
        assert times is not None  # as `check_sampling` has seen
        steps, (first, last) = np.arange(len(times) - 1), self.skip_interval
        there = (steps > first * len(steps)) & (steps < last * len(steps))
        if not there.any():
            return None
        shown = course.shown(times).astype(np.float64)
        found, others = shown[:-1][there], np.append(shown[:-1][~there], shown[-1:])
        # Half way to the next step that has it not: a time is rounded otherwise in the loop.
        below, above = others[others < found.min()], others[others > found.max()]
        low = (found.min() + below.max()) / 2 if below.size else found.min() - 1
        return float(low), float((found.max() + above.min()) / 2 if above.size else found.max() + 1)

    def choice(self, process: Process) -> Choice:
        """What a sampler of this process is told."""
        sampler = self.sampler or ("ddim" if self.eta else DEFAULT)  # who gives DDIM's noise means it
        return Choice(sampler, self.steps, self.eta, self.grid, self.grid_shift)


def sampling_model(config: Config, size: tuple[int, int] | None = None) -> Model:
    """The network of a resolved config, computed as this machine can: it may not be the one that trained.

    size: height and width of the latents (None: --model.input-size).
    """
    model = build_model(config).of_size(size or config.model.input_size)
    return model.clone(compute=model.compute.on(jax.devices()[0], model.num_tokens, model.head_dim))


def batch_axes(mesh: Mesh) -> PartitionSpec:
    """The batch split over every axis of the mesh but tensor."""
    return PartitionSpec(tuple(name for name in mesh.axis_names if name != "tensor"))


def device_mesh(count: int | None = None) -> Mesh:
    """All devices, or the first ones of this process, for the batch."""
    devices = jax.devices() if count is None else jax.local_devices()[:count]
    return Mesh(np.array(devices), ("data",))


def guided_network(
    process: Process, config: Config, options: SamplingOptions, model: Model, params: Any, told: Told,
    guide: Model | None, mesh: Mesh,
) -> DenoiseFn:  # fmt: skip
    """The network of samples that are told this, as a sampler asks it; `guide` as of `make_latent_sampler`."""
    split, device = NamedSharding(mesh, batch_axes(mesh)), mesh.devices.flat[0]

    def network_of(model: Model, params: Any) -> Network:
        # Quantization is for training: its scales hang on the whole batch, and a sample must not.
        unroll = model.compute.unroll or unrolls(config.compute.unroll, model.hidden_size, mesh)
        model = model.clone(compute=model.compute.on(device, model.num_tokens, model.head_dim))
        split_model = model.computed(batch_sharding=split, quantization="none", unroll=unroll)
        return lambda x, t, y: split_model.apply({"params": params}, x, t, y)

    of_model, of_guide = (params, None) if guide is None else params
    weaker = guide and network_of(guide, of_guide)
    skips = network_of(model.without(options.skip_layers), of_model) if options.skip_layers else None
    return options.guided(process, model.condition, told, network_of(model, of_model), weaker, skips)


@functools.lru_cache(maxsize=8)  # a run that draws at intervals compiles once
def make_latent_sampler(
    model: Model,
    config: Config,
    options: SamplingOptions,
    mesh: Mesh,
    counted: bool = False,
    guide: Model | None = None,
    gathered: bool = True,
) -> LatentSampler:
    """A jitted (params, seed, sample indices (B,), condition of B, null) -> latents (B, H, W, C), replicated.

    counted: (latents, how often the network ran) instead. gathered: False leaves the latents split as the batch is.
    guide: a weaker network to be drawn away from; `params` are then a pair, the second one its own.
    The whole sampling loop is one program. B must be a multiple of the mesh's devices on the batch axes.
    """
    process = create_process(config.diffusion)
    choice = options.choice(process)
    split, whole = NamedSharding(mesh, batch_axes(mesh)), NamedSharding(mesh, PartitionSpec())
    given = whole if gathered else split

    def sample(params: Any, seed: Array, indices: Array, condition: Any, null: Any) -> Any:
        keys = sample_keys(jax.random.key(seed), indices)
        noise = start_noise(keys, (*model.latent_size, model.in_channels))

        told = Told(condition, null)
        denoise = guided_network(process, config, options, model, params, told, guide, mesh)
        drawn = draw_samples(process, denoise, noise, keys, choice=choice)
        return (drawn.x, drawn.evaluations) if counted else drawn.x

    return LatentSampler(jax.jit(
        sample, in_shardings=(None, None, split, split, None),
        out_shardings=(given, whole) if counted else given, compiler_options=compiler_options(mesh),
    ))  # fmt: skip


@dataclass(frozen=True)
class LatentSampler:
    """What `make_latent_sampler` gives; a call needs no null."""

    jitted: Any

    def __call__(self, params: Any, seed: int, indices: Any, condition: Any, null: Any = None) -> Any:
        """See `make_latent_sampler`."""
        return self.jitted(params, seed, indices, condition, null)

    def lower(self, params: Any, seed: int, indices: Any, condition: Any, null: Any = None) -> Any:
        """The program of arguments like these."""
        return self.jitted.lower(params, seed, indices, condition, null)


def generate_images(
    model: Model,
    params: Any,
    config: Config,
    options: SamplingOptions,
    condition: Any,
    decoder: Decoder | None,
    mesh: Mesh,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
    told: Callable[[int], None] | None = None,
    guide: Model | None = None,
    null: Condition | None = None,
) -> np.ndarray:
    """Images (N, h, w, 3) uint8 of samples 0..N-1 with this condition, such as labels (N,).

    told: is called after every batch with how often the network ran for it. guide: as of `make_latent_sampler`. null:
    what stands in the condition's place under guidance, of one sample (None: the network's own).
    In a run of several processes all must call; only process 0 decodes, the others get an empty array.
    Raises ConfigError for a condition or options that the model cannot serve.
    """
    condition = model.condition.on_host(condition)
    check_sampling(model, config, options, condition, guide is not None or null is not None)
    count = samples_of(condition)
    devices = mesh.size // mesh.shape.get("tensor", 1)
    batch_size = min(batch_size, count)
    batch_size += -batch_size % devices
    sampler = make_latent_sampler(model, config, options, mesh, True, guide)
    images: list[np.ndarray] = []
    problem: Exception | None = None
    lead = jax.process_index() == 0
    with tqdm(total=count, unit="sample", desc="sampling", disable=not (progress and lead)) as bar:
        for latents, evaluations in latent_batches(
            sampler, params, seed, Told(condition, null), batch_size, mesh
        ):
            if lead and decoder is not None and problem is None:
                try:
                    images.append(np.asarray(decoder(latents)))
                except Exception as error:
                    if jax.process_count() == 1:
                        raise
                    problem = error  # raised below: the others need this process for their samples
            if told is not None:
                told(evaluations)
            bar.update(len(latents))
    if problem is not None:
        raise problem
    return np.concatenate(images) if images else np.zeros((0, 1, 1, 3), np.uint8)


def latent_batches(
    sampler: Callable[..., Any], params: Any, seed: int, told: Told, batch_size: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, int]]:
    """(latents (b, H, W, C), how often the network ran) of one batch after the other.

    sampler: a counted one of `make_latent_sampler`. Raises FloatingPointError for values that are not finite.
    """
    condition, null = told
    count = samples_of(condition)
    for start in range(0, count, batch_size):
        part = min(batch_size, count - start)
        try:
            drawn, evaluations = sampler(params, seed, *batch_of(condition, start, batch_size, mesh), null)
            latents = np.asarray(drawn)[:part]
        except jax.errors.JaxRuntimeError:  # too little memory, say
            all_fail_alike()
            raise
        if not np.isfinite(latents).all():
            raise FloatingPointError(f"samples {start} to {start + part - 1} hold values that are not finite")
        yield latents, int(evaluations)


def batch_of(condition: Condition, start: int, size: int, mesh: Mesh) -> tuple[Array, Condition]:
    """(numbers, condition) of `size` samples from `start` on, split over a mesh; the last sample's stands for those
    that there are not."""
    split = NamedSharding(mesh, batch_axes(mesh))

    def place(values: np.ndarray) -> Array:  # jit takes no NumPy array that is split over several processes
        return jax.make_array_from_callback(values.shape, split, values.__getitem__)

    numbers = np.arange(start, start + size, dtype=np.int32)
    rows = np.minimum(numbers, samples_of(condition) - 1)
    return place(numbers), jax.tree.map(lambda values: place(values[rows]), condition)


def samples_of(condition: Condition) -> int:
    """How many samples a condition is of."""
    return len(jax.tree.leaves(condition)[0])


def check_sampling(
    model: Model, config: Config, options: SamplingOptions, condition: Any, by_another: bool = False
) -> None:
    """Raises ConfigError where options or the condition, such as labels (N,), do not fit the model or the process.

    by_another: another network guides, or another condition.
    """
    kind = model.condition
    condition = kind.on_host(condition)
    most_steps, in_words = config.diffusion.steps_of_a_sampler()
    if not 2 <= options.steps <= most_steps:
        raise ConfigError(f"--steps is {options.steps}; expected {in_words}")
    process = create_process(config.diffusion)
    try:
        plan(process, options.choice(process))
    except ValueError as error:
        option, _, rest = str(error).partition(" ")
        raise ConfigError(f"--{option.replace('_', '-')} {rest}") from None
    if samples_of(condition) == 0:
        raise ConfigError("--num-samples is 0; expected a number above 0")
    kind.check(condition)
    if not abs(options.cfg_scale) <= FLOAT32_MOST:  # nan is no less than anything
        raise ConfigError(f"--cfg-scale is {options.cfg_scale}; expected a finite number")
    if options.channels != "all" and not 1 <= options.channels <= model.in_channels:
        raise ConfigError(f"--cfg-channels is {options.channels}; expected all, or 1 to {model.in_channels}")
    if options.interval is not None and not -(2**31) <= options.interval[0] <= options.interval[1] < 2**31:
        raise ConfigError(
            f"--cfg-interval is {options.interval}; expected the lowest timestep first, and none beyond {2**31 - 1}"
        )
    _check_skipping(model, process, options)
    if not 0 <= options.rescale <= 1:
        raise ConfigError(f"--cfg-rescale is {options.rescale}; expected 0 to 1")
    if options.cfg_scale != 1.0 and not kind.has_null and not by_another:
        raise ConfigError(
            f"--cfg-scale is {options.cfg_scale}; expected 1, because the model was trained without a null label"
        )


def _check_skipping(model: Model, process: Process, options: SamplingOptions) -> None:
    """Raises ConfigError where skip-layer guidance does not fit the model or the sampler."""
    if not options.skip_layers:
        return
    wrong = next((i for i in options.skip_layers if not 0 <= i < model.depth), None)
    if wrong is not None:
        raise ConfigError(f"--skip-layers names {wrong}; expected 0 to {model.depth - 1}")
    if not abs(options.skip_scale) <= FLOAT32_MOST:
        raise ConfigError(f"--skip-layer-scale is {options.skip_scale}; expected a finite number")
    first, last = options.skip_interval
    if not 0 <= first <= last <= 1:
        raise ConfigError(
            f"--skip-layer-interval is {first} {last}; expected two shares of the steps, 0 to 1"
        )
    if plan(process, options.choice(process)).times is None:
        raise ConfigError(
            f"--skip-layers with --sampler {options.sampler}, whose steps are its own; expected another"
        )


def check_sample_grids(config: Config, metadata: LatentMetadata) -> None:
    """Raises ConfigError, before a run starts, where its grids of samples could not be decoded or held."""
    count = config.train.sample_count
    check_pictures("--train.sample-count", count, count, metadata.image_size)
    check_decoder("--train.sample-every", config.train.sample_every, config, metadata)


def watching(config: Config, model: Model) -> SamplingOptions:
    """How a run draws samples while it trains."""
    t = config.train
    scale = t.sample_cfg_scale if model.condition.has_null else 1.0
    return SamplingOptions(steps=t.sample_steps, cfg_scale=scale)


def write_sample_grid(
    path: str | os.PathLike[str],
    *,
    config: Config,
    model: Model,
    params: Any,
    metadata: LatentMetadata,
    mesh: Mesh,
    examples: tuple[Condition, Sequence[str]] | None = None,
) -> None:
    """The grid of samples that a run writes at intervals: the same samples each time, so that progress shows.

    examples: `train.sample_count` conditions, and the captions that stand under their pictures, if there are any
    (None: the conditions that show them all).
    """
    t, kind, params = config.train, model.condition, merged(params, config.lora)
    decoder = load_decoder(metadata, config.data.vae or None) if jax.process_index() == 0 else None
    condition, captions = examples or (kind.in_turn(t.sample_count), ())
    images = generate_images(model, params, config, watching(config, model), condition, decoder, mesh, t.seed)
    if decoder is not None:
        save_grid(path, images, captions=captions or None)
