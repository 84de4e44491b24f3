"""Reading a latent dataset, and drawing latents from its moments.

Legend: B batch, n records asked for, M views (1, or 2: image and mirror image), h, w latent height and width,
c latent channels.
"""

from __future__ import annotations

import functools
import os
import pathlib
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.conditions import Condition, condition_of
from dit_jax.config import Config, ConfigError
from dit_jax.data.metadata import DataError, LatentMetadata, load_metadata, parse, shard_name
from dit_jax.processes import on_lead


class LatentDataset:
    """Random access to the records of a prepared dataset; safe to read from many threads.

    directory: a finished dataset. mirror: read the mirror image's moments too where they are stored.
    Raises DataError where the folder holds no finished dataset or a shard is missing or of another size.
    """

    def __init__(self, directory: str | os.PathLike[str], mirror: bool = True):
        self.directory = pathlib.Path(directory)
        self.metadata: LatentMetadata = load_metadata(directory)
        m = self.metadata
        self.condition = m.condition
        self.shards = [self.directory / shard_name(i, m.num_shards) for i in range(m.num_shards)]
        for shard, size in zip(self.shards, m.shard_bytes, strict=True):
            found = shard.stat().st_size if shard.is_file() else "no file"
            if found != size:
                raise DataError(
                    f"{shard} has {found} bytes; metadata.json says {size}: prepare the dataset again"
                )
        self._ends = np.cumsum(m.shard_counts)
        self._reader = _readers()
        self._views = m.moments_shape[0] if mirror else 1
        if len(self):
            # A damaged set shows at once; and what reading imports is imported here, in one thread: TFDS imports
            # lazily, and several reading threads that did so at the same time would wait for each other for ever.
            self.read([0])

    def __len__(self) -> int:
        return self.metadata.count

    def __repr__(self) -> str:
        return f"LatentDataset({str(self.directory)!r}, {len(self)} records)"

    @property
    def record_shape(self) -> tuple[int, int, int, int]:
        """(M, h, w, 2c) of the moments that `read` returns."""
        return (self._views, *self.metadata.moments_shape[1:])

    @property
    def record_bytes(self) -> int:
        """Bytes of one record's moments as `read` returns them."""
        return int(np.prod(self.record_shape)) * np.dtype(self.metadata.dtype).itemsize

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """`moments` (n, M, h, w, 2c), mean then std, and the condition's arrays, of these records in this order.

        Raises IndexError for an index outside the set and DataError for a damaged record.
        """
        rows = np.asarray(indices, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"indices {rows.min()}..{rows.max()} reach outside {self!r}")
        m = self.metadata
        stored = int(np.prod(m.moments_shape)) * np.dtype(m.dtype).itemsize
        moments = np.empty((len(rows), *self.record_shape), m.dtype)
        flat = moments.reshape(len(rows), -1)
        condition = self.condition.empty(len(rows))
        for row, (_, values, data) in self._records(rows):
            if len(data) != stored:
                raise DataError(
                    f"record {rows[row]} of {self.directory} has {len(data)} bytes of moments; "
                    f"expected {stored} for {m.moments_shape} {m.dtype}"
                )
            flat[row] = np.frombuffer(data, m.dtype, flat.shape[1])
            for name, array in condition.items():
                array[row] = values[name]
        return {"moments": moments, **condition}

    def ids(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The source ids of these records."""
        found = dict(self._records(np.asarray(indices, np.int64)))
        return [os.fsdecode(found[row][0]) for row in range(len(found))]

    def _records(self, rows: np.ndarray) -> Iterator[tuple[int, tuple[bytes, Condition, bytes]]]:
        """(place in rows, parsed record), shard by shard."""
        order = np.argsort(rows, kind="stable")  # by shard, and forwards within each
        bounds = np.searchsorted(rows[order], np.concatenate([[0], self._ends]))
        for shard in np.flatnonzero(np.diff(bounds)).tolist():
            where = order[bounds[shard] : bounds[shard + 1]]
            first = self._ends[shard] - self.metadata.shard_counts[shard]
            records = self._read_shard(shard, rows[where] - first)
            for row, record in zip(where.tolist(), records, strict=True):
                yield row, parse(record, self.condition.fields)

    def _read_shard(self, shard: int, positions: np.ndarray) -> Sequence[bytes]:
        try:
            reader = self._reader(os.fspath(self.shards[shard]))
            # One range per record costs a third of the CPU time of one list of positions, which wakes the
            # library's thread pool for each; the loader's threads read in parallel anyway.
            return [record for at in positions.tolist() for record in reader.read(at, at + 1)]
        except (ValueError, RuntimeError, IndexError) as error:
            raise DataError(f"{self.shards[shard]} cannot be read: {error}") from None

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _reader=_readers())


def _readers() -> Callable[[str], Any]:
    """A function that gives a file's open reader, the same one to all threads.

    No more stay open than half of the files that this process may open; the one unused for longest goes first. Its
    file closes when the last thread that still reads from it lets go.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return functools.lru_cache(max(1, files // 2) if files != resource.RLIM_INFINITY else None)(_open)


def _open(file: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(file, options="readahead_buffer_size:0", file_reader_buffer_size=32768)
    if not reader.ok():
        reader.close()  # raises what was wrong
    return reader


def draw_latents(
    batch: Mapping[str, jax.Array], key: jax.Array, scaling_factor: float, shift_factor: float, mirror: bool
) -> jax.Array:
    """Latents (B, h, w, c) float32 as the network sees them, drawn from the posterior; runs inside jit.

    batch: `moments` (B, M, h, w, 2c). With `mirror` each example is the image or its mirror with equal chance
    (needs M = 2). z = mean + std * eps, latent = (z - shift_factor) * scaling_factor.
    """
    moments = batch["moments"]
    if mirror and moments.shape[1] != 2:
        raise ValueError(f"moments have shape {moments.shape}; mirror needs image and mirror on axis 1")
    choice, noise = jax.random.split(key)
    if mirror:
        flip = jax.random.bernoulli(choice, shape=(moments.shape[0], 1, 1, 1))
        moments = jnp.where(flip, moments[:, 1], moments[:, 0])
    else:
        moments = moments[:, 0]
    mean, std = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    z = mean + std * jax.random.normal(noise, mean.shape, jnp.float32)
    return (z - shift_factor) * scaling_factor


def open_dataset(config: Config) -> LatentDataset:
    """The dataset of a run, checked against its config; the digits are prepared at first use.

    Raises ConfigError, in one sentence, where the dataset contradicts the config, and DataError where there
    is none and it cannot be prepared without being asked.
    """
    directory = config.data.dir
    if not directory:
        raise ConfigError("--data.dir is empty; expected the folder of a dataset made by prepare.py")
    if config.data.source == "digits":
        _prepare_digits(directory)
    dataset = LatentDataset(directory, mirror=config.data.mirror)
    check_dataset(dataset.metadata, config)
    return dataset


def check_dataset(metadata: LatentMetadata, config: Config) -> None:
    """Raise ConfigError, in one sentence, where a dataset contradicts a config."""
    where, model = f"the dataset in {config.data.dir}", config.model
    if metadata.latent_shape != (*model.input_size, model.in_channels):
        raise ConfigError(
            f"{where} has latents of (height, width, channels) = {metadata.latent_shape}; "
            f"--model.input-size and --model.in-channels say {(*model.input_size, model.in_channels)}"
        )
    condition_of(config).check_data(metadata.condition, where)
    if config.data.mirror and not metadata.mirrors:
        raise ConfigError(
            f"{where} holds no mirror images; set --data.no-mirror, or prepare it again with --mirrors"
        )
    if config.data.vae:
        from dit_jax.interop.diffusers import weights_hash

        try:
            wanted = weights_hash(config.data.vae)
        except OSError as error:
            raise ConfigError(f"--data.vae: {error}") from None
        if wanted != metadata.vae_hash:
            raise ConfigError(
                f"{where} was encoded by {metadata.vae} with weights {metadata.vae_hash[:12]}; "
                f"--data.vae {config.data.vae} has weights {wanted[:12]}"
            )


def _prepare_digits(directory: str) -> None:
    """Process 0 prepares the digits where they are missing; the others wait for it."""
    from dit_jax.data.metadata import METADATA_FILE

    def make() -> None:
        if os.path.isfile(pathlib.Path(directory) / METADATA_FILE):
            return
        from dit_jax.data.encode import prepare
        from dit_jax.data.encoders import flax_encoder
        from dit_jax.data.sources import open_source

        prepare(open_source("digits"), flax_encoder("digits"), directory, image_size=32, mirrors=False)

    on_lead(make)
