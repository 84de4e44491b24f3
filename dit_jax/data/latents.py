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

from dit_jax import paths
from dit_jax.conditions import AnyCondition, condition_of
from dit_jax.config import Config, ConfigError
from dit_jax.data.captions import Reader, captions_in
from dit_jax.data.metadata import DataError, LatentMetadata, load_metadata, shard_name
from dit_jax.data.mixture import Mixture, check_parts
from dit_jax.data.records import features_of
from dit_jax.data.shard_cache import ShardCache, cache_of_bucket, needs_cache, open_cache
from dit_jax.processes import on_lead

MANY = 4096  # shards, of which each would be asked for its size at the start


class LatentDataset:
    """Random access to the records of a prepared dataset; safe to read from many threads.

    directory: a finished dataset. mirror: read the mirror image's moments too where they are stored. condition: what
    is read beside them (None: the labels), which the records must hold. cache: where shards are copied before they
    are read (None: they are read where they lie).
    Raises DataError where the folder holds no finished dataset or a shard is missing or of another size; of more than
    MANY shards the size is looked at when one is opened.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        mirror: bool = True,
        condition: AnyCondition | None = None,
        cache: ShardCache | None = None,
    ):
        self.directory = paths.to_path(directory)
        self.metadata: LatentMetadata = load_metadata(directory)
        m = self.metadata
        self.condition: AnyCondition = condition or m.condition
        self.conditions = Reader(self.condition, m)
        self._check_shards()
        self._ends = np.cumsum(m.shard_counts)
        self._cache = cache or (cache_of_bucket(self.directory) if needs_cache(self.directory) else None)
        self._reader = self._readers()
        self._views = m.moments_shape[0] if mirror else 1
        if len(self):
            # A damaged set shows at once; and what reading imports is imported here, in one thread: TFDS imports
            # lazily, and several reading threads that did so at the same time would wait for each other for ever.
            self.read([0])

    def __len__(self) -> int:
        return self.metadata.count

    @property
    def parts(self) -> tuple[LatentDataset, ...]:
        """The sets that this one is made of: itself."""
        return (self,)

    def shard(self, number: int) -> pathlib.Path:
        """The file of a shard."""
        return self.directory / shard_name(number, self.metadata.num_shards)

    @property
    def shards(self) -> list[pathlib.Path]:
        """The files of all shards."""
        return [self.shard(number) for number in range(self.metadata.num_shards)]

    def _check_shards(self) -> None:
        """Raises DataError for a shard that is missing or of another size; of many shards, whose size is looked at
        when they are opened, for one that is missing."""
        many = self.metadata.num_shards > MANY
        if many and paths.is_remote(self.directory):
            return  # a store lists a thousand at a time
        names = set(paths.names_in(self.directory)) if many else set()
        sizes = {} if many else paths.sizes_in(self.directory)
        for number, size in enumerate(self.metadata.shard_bytes):
            name = shard_name(number, self.metadata.num_shards)
            found = sizes.get(name, size if name in names else "no file")
            if found != size:
                raise DataError(f"{self.shard(number)} {_other_size(found, size)}: prepare the dataset again")

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

    def read(
        self, indices: Sequence[int] | np.ndarray, words: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """`moments` (n, M, h, w, 2c), mean then std, and the condition's arrays, of these records in this order.

        words: (n,) uint64, by which one of a record's captions is drawn (None: the first one).
        Raises IndexError for an index outside the set and DataError for a damaged record.
        """
        rows = self._checked(indices)
        moments = np.empty((len(rows), *self.record_shape), self.metadata.dtype)
        condition = self.conditions.empty(len(rows))
        drawn = [0] * len(rows) if words is None else words.tolist()
        for row, feature in self.records(rows):
            try:
                self._put_moments(moments, row, feature)
                self.conditions.put(condition, row, feature, drawn[row])
            except DataError as error:
                raise self._of_record(rows[row], error) from None
        return {"moments": moments, **condition}

    def read_into(
        self, moments: np.ndarray, first: int, last: int, each: Callable[[int, Mapping[str, Any]], None]
    ) -> None:
        """The moments of records first..last - 1 to their rows of `moments`, and each one's features to `each`."""
        for row, feature in self.records(self._checked(range(first, last))):
            try:
                self._put_moments(moments, first + row, feature)
                each(first + row, feature)
            except DataError as error:
                raise self._of_record(first + row, error) from None

    def ids(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The source ids of these records."""
        found = dict(self.records(self._checked(indices)))
        return [os.fsdecode(found[row]["id"].bytes_list.value[0]) for row in range(len(found))]

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[tuple[str, ...]]:
        """All captions of these records; DataError for a set that has none."""
        found = dict(self.records(self._checked(indices)))
        return [tuple(captions_in(found[row])) for row in range(len(found))]

    def examples(self, n: int) -> tuple[dict[str, np.ndarray], list[str]]:
        """Conditions of n records, evenly spread over the set, with their first captions; none of a set of labels.

        Of a set smaller than n some stand there more than once.
        """
        rows = np.linspace(0, len(self), n, endpoint=False).astype(np.int64)
        condition = self.read(rows)
        del condition["moments"]
        captions = [words[0] for words in self.captions(rows)] if self.conditions.of_text else []
        return condition, captions

    def _checked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(indices, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"indices {rows.min()}..{rows.max()} reach outside {self!r}")
        return rows

    def _of_record(self, row: int, error: DataError) -> DataError:
        """What is wrong with a record, with its number and its folder."""
        return DataError(str(error).replace("a record", f"record {row} of {self.directory}", 1))

    def _put_moments(self, moments: np.ndarray, row: int, feature: Mapping[str, Any]) -> None:
        m, data = self.metadata, feature["moments"].bytes_list.value[0]
        stored = int(np.prod(m.moments_shape)) * np.dtype(m.dtype).itemsize
        if len(data) != stored:
            raise DataError(
                f"a record has {len(data)} bytes of moments; expected {stored} for {m.moments_shape} {m.dtype}"
            )
        flat = moments[row].reshape(-1)
        flat[:] = np.frombuffer(data, m.dtype, len(flat))

    def records(self, rows: np.ndarray) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(place in rows, features of the record), shard by shard."""
        order = np.argsort(rows, kind="stable")  # by shard, and forwards within each
        of_shard = np.searchsorted(self._ends, rows[order], side="right")
        for shard in np.unique(of_shard).tolist():
            where = order[of_shard == shard]
            first = self._ends[shard] - self.metadata.shard_counts[shard]
            records = self._read_shard(shard, rows[where] - first)
            for row, record in zip(where.tolist(), records, strict=True):
                yield row, features_of(record)

    def _read_shard(self, shard: int, positions: np.ndarray) -> Iterator[bytes]:
        """The records at these positions, one after the other: with embeddings they are large."""
        for at in positions.tolist():
            try:
                # One range per record costs a third of the CPU time of one list of positions, which wakes the
                # library's thread pool for each; the loader's threads read in parallel anyway.
                (record,) = self._reader(shard).read(at, at + 1)
            except (OSError, ValueError, RuntimeError, IndexError) as error:
                raise DataError(f"{self.shard(shard)} cannot be read: {error}") from None
            yield record

    def _readers(self) -> Callable[[int], Any]:
        """A function that gives a shard's open reader, the same one to all threads.

        No more stay open than half of the files that this process may open; the one unused for longest goes first.
        Its file closes when the last thread that still reads from it lets go. What has left a cache and is still open
        has its place on the disk: that is a quarter of the cache, or one shard.
        """
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = max(1, files // 2) if files != resource.RLIM_INFINITY else None
        if self._cache and len(self):
            of_cache = max(1, self._cache.limit // (4 * max(self.metadata.shard_bytes)))
            most = min(most or of_cache, of_cache)
        return functools.lru_cache(most)(self._open)

    def _open(self, shard: int) -> Any:
        """A reader of a shard, or of its copy in the cache."""
        file, size = self.shard(shard), self.metadata.shard_bytes[shard]
        if self._cache is None:
            return _open(file, size)
        with self._cache.held(file, size, self.metadata.shard_sha256[shard]) as local:
            return _open(local, size)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reader = self._readers()


def _other_size(found: object, size: int) -> str:
    return f"has {found} bytes; metadata.json says {size}"


def _open(file: pathlib.Path, size: int) -> Any:
    """A reader of a file, which must be of this size; of Google's buckets it reads what it is asked for."""
    found = paths.size_of(file)
    if found != size:
        raise ValueError(f"it {_other_size(found, size)}")
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file), options="readahead_buffer_size:0", file_reader_buffer_size=32768)
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


def open_dataset(config: Config) -> LatentDataset | Mixture:
    """The dataset of a run, checked against its config; the digits are prepared at first use.

    Raises ConfigError, in one sentence, where the dataset contradicts the config, and DataError where there
    is none and it cannot be prepared without being asked.
    """
    mixture, kind = config.data.mixture, condition_of(config)
    folders = [folder for folder, _ in mixture] or [config.data.dir]
    if not folders[0]:
        raise ConfigError("--data.dir is empty; expected the folder of a dataset made by prepare.py")
    if config.data.source in EMBEDDED and config.data.dir in folders:
        _prepare_embedded(config.data.source, config.data.dir)
    found = [load_metadata(folder) for folder in folders]
    if mixture:
        check_parts(folders, found, kind, bool(config.data.sizes))
        if config.model.input_size not in {metadata.latent_shape[:2] for metadata in found}:
            raise ConfigError(
                f"--model.input-size is {config.model.input_size}; expected the size of a part of --data.mixture, "
                f"{' or '.join(sorted({str(metadata.latent_shape[:2]) for metadata in found}))}"
            )
    for folder, metadata in zip(folders, found, strict=True):
        check_dataset(metadata, config, folder)
    cache = open_cache(config.data)
    for folder, metadata in zip(folders, found, strict=True):
        if cache and cache.limit < max(metadata.shard_bytes, default=0):
            raise ConfigError(
                f"--data.local-cache-gb is {config.data.local_cache_gb:g}; expected room for the largest shard of "
                f"{folder}, {max(metadata.shard_bytes) / 1e9:.3g}"
            )
    parts = [LatentDataset(folder, config.data.mirror, kind, cache) for folder in folders]
    weights = [weight for _, weight in mixture]
    return Mixture(parts, weights, config.model.input_size) if mixture else parts[0]


def check_dataset(metadata: LatentMetadata, config: Config, folder: str = "") -> None:
    """Raise ConfigError, in one sentence, where a dataset, in `folder` or else the config's, contradicts a config."""
    where, model = f"the dataset in {folder or config.data.dir}", config.model
    sizes = (model.input_size, *config.data.sizes)
    if config.data.sizes and metadata.latent_shape not in [(*size, model.in_channels) for size in sizes]:
        raise ConfigError(
            f"{where} has latents of (height, width, channels) = {metadata.latent_shape}; --model.input-size, "
            f"--data.sizes and --model.in-channels say {' or '.join(map(str, sizes))} and {model.in_channels}"
        )
    if not config.data.sizes and metadata.latent_shape != (*model.input_size, model.in_channels):
        raise ConfigError(
            f"{where} has latents of (height, width, channels) = {metadata.latent_shape}; "
            f"--model.input-size and --model.in-channels say {(*model.input_size, model.in_channels)}"
        )
    kind = condition_of(config)
    kind.check_data(metadata.stored(kind), where)
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


EMBEDDED = {"digits": 32, "digits-text": 64}
"""Sources that ship along, which are prepared at first use: side of the pictures."""


def _prepare_embedded(source: str, directory: str) -> None:
    """Process 0 prepares such a source where it is missing; the others wait for it."""
    from dit_jax.data.metadata import METADATA_FILE

    def make() -> None:
        if paths.is_file(paths.to_path(directory) / METADATA_FILE):
            return
        from dit_jax.data.encode import prepare
        from dit_jax.data.encoders import flax_encoder
        from dit_jax.data.sources import open_source

        encoder, size = flax_encoder("digits"), EMBEDDED[source]
        source_of = open_source(source)
        prepare(source_of, encoder, directory, image_size=size, mirrors=False, option="--data.dir")

    on_lead(make)
