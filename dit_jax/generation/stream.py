"""Samples by the thousand: every process draws, decodes and keeps its own, and holds two batches at a time.

A sample is a function of (seed, its number, label) alone, so that processes need nothing of each other: each has a
mesh of its own devices and takes batches in turn. Only a network whose parameters are split over processes is asked
by all of them together; each then decodes the samples that lie on its devices.

Letters: B samples in a batch, H and W latent sides, C latent channels, h and w sides of a picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from dit_jax.conditions import Condition
from dit_jax.config import Config
from dit_jax.generation.decoding import Decoder
from dit_jax.generation.parts import Parts
from dit_jax.generation.sampling import SamplingOptions, batch_of, make_latent_sampler, samples_of
from dit_jax.models.create import Model
from dit_jax.processes import all_fail_alike

Array = jax.Array
Keep = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""What is kept of pictures (b, h, w, 3) uint8: arrays (b, ...) by name."""


@dataclass(frozen=True)
class Source:
    """Samples 0 to N-1: all that decides what they are, and the devices that draw them.

    Attributes: `condition` of all N; `batch_size` over the devices of all processes; `params` lie on `mesh`, with a
    guide as in `make_latent_sampler`; `null` is what stands in a condition's place under guidance, of one sample
      (None: the network's own).
    """

    model: Model
    params: Any
    config: Config
    options: SamplingOptions
    condition: Condition
    decoder: Decoder
    mesh: Mesh
    seed: int = 0
    batch_size: int = 128
    guide: Model | None = None
    null: Condition | None = None


@dataclass(frozen=True)
class Drawn:
    """This process's part of a batch under way: the devices may still be computing it.

    Attributes: `numbers` (b,) of its samples, ascending; their `latents` (b, H, W, C) and `images` (b, h, w, 3), or
    the error that these ended in.
    """

    numbers: np.ndarray
    latents: Any
    images: Any
    evaluations: Any


def on_own_devices(source: Source) -> Source:
    """The same samples, drawn by the devices of this process alone; as it was where no device has all parameters.

    Nothing is copied.
    """
    if not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(source.params)):
        return source
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())

    def own(leaf: Array) -> Array:
        pieces = {shard.device: shard.data for shard in leaf.addressable_shards}
        return jax.make_array_from_single_device_arrays(
            leaf.shape, whole, [pieces[device] for device in mesh.devices.flat]
        )

    return dataclasses.replace(source, params=jax.tree.map(own, source.params), mesh=mesh)


def draw(source: Source, parts: Parts, keep: Keep, progress: bool = False) -> int:
    """Draw the samples that `parts` misses and put there what is kept of them; how often the network ran for one.

    Returns when this process has done its share (0 evaluations where it had none). Raises FloatingPointError for
    latents that are not finite.
    """
    spans = source.mesh.is_multi_process
    turns = 1 if spans else jax.process_count()  # processes that draw batches of their own
    of_each = source.mesh.size // source.mesh.shape.get("tensor", 1)
    size = -(-min(source.batch_size, samples_of(source.condition)) // turns)
    size += -size % of_each
    batches = [(at, min(at + size, stop)) for start, stop in parts.missing for at in range(start, stop, size)]
    mine = batches if spans else batches[jax.process_index() :: turns]
    lead, evaluations, problem = jax.process_index() == 0, 0, None
    total = sum(stop - start for start, stop in batches)
    done = parts.count - total
    with tqdm(
        total=parts.count, initial=done, unit="sample", desc="sampling", disable=not (progress and lead)
    ) as bar:
        for turn, drawn in enumerate(_ahead(_batches(source, mine, size))):
            try:
                if problem is None:
                    evaluations = max(evaluations, int(drawn.evaluations))
                    _put(drawn, parts, keep)
            except Exception as error:
                if not spans:
                    raise
                problem = error  # raised below: the others need this process for their samples
            bar.update(sum(stop - start for start, stop in batches[turn * turns : (turn + 1) * turns]))
    if problem is not None:
        raise problem
    return evaluations


def _batches(source: Source, batches: list[tuple[int, int]], size: int) -> Iterator[Drawn]:
    """One batch after the other, given to the devices."""
    s = source
    sampler = make_latent_sampler(s.model, s.config, s.options, s.mesh, True, s.guide, False)
    for start, stop in batches:
        try:
            numbers, condition = batch_of(s.condition, start, size, s.mesh)
            latents, evaluations = sampler(s.params, s.seed, numbers, condition, s.null)
            rows, own = _own(latents, stop - start)
        except jax.errors.JaxRuntimeError:  # too little memory, say
            if s.mesh.is_multi_process:
                all_fail_alike()
            raise
        yield Drawn(start + rows, own, _decoded(s, own) if len(rows) else None, evaluations)


def _decoded(source: Source, latents: Any) -> Any:
    """Pictures, or why there are none: the other processes may need this one for their samples all the same."""
    try:
        return source.decoder(latents)
    except Exception as error:
        return error


def _own(latents: Array, count: int) -> tuple[np.ndarray, Any]:
    """(numbers in the batch, latents) of those of the first `count` samples that this process is to decode."""
    numbers = np.arange(len(latents))
    if latents.is_fully_addressable:
        # The last batch is cut on the host: the decoder then works as on a batch of that size, to the bit.
        return numbers[:count], latents if count == len(latents) else np.asarray(latents)[:count]
    shards = [shard for shard in latents.addressable_shards if shard.replica_id == 0]
    if not shards:
        return numbers[:0], None
    rows = np.concatenate([numbers[shard.index[0]] for shard in shards])
    found = np.concatenate([np.asarray(shard.data) for shard in shards])
    order = np.argsort(rows)
    order = order[rows[order] < count]
    return rows[order], found[order]


def _ahead(batches: Iterator[Drawn]) -> Iterator[Drawn]:
    """The same, each when the next one is on its way: the devices draw while the host fetches and keeps."""
    before = None
    for drawn in batches:
        if before is not None:
            yield before
        before = drawn
    if before is not None:
        yield before


def _put(drawn: Drawn, parts: Parts, keep: Keep) -> None:
    """Fetch a batch and put what is kept of it, one part for each run of numbers."""
    if isinstance(drawn.images, Exception):
        raise drawn.images
    if not len(drawn.numbers):
        return
    if not np.isfinite(np.asarray(drawn.latents)).all():
        raise FloatingPointError(
            f"samples {drawn.numbers[0]} to {drawn.numbers[-1]} hold values that are not finite"
        )
    images = np.asarray(drawn.images)
    ends = [*(np.flatnonzero(np.diff(drawn.numbers) > 1) + 1), len(images)]
    for first, end in zip([0, *ends], ends, strict=False):
        parts.put(int(drawn.numbers[first]), keep(images[first:end]))
