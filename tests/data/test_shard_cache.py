"""Shards that are copied to the host: whole, once, within a limit, the one unused for longest leaves first."""

import dataclasses
import fcntl
import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dit_jax.config import Config, ConfigError, DataConfig, from_json, resolve, to_json
from dit_jax.data.encode import prepare
from dit_jax.data.latents import LatentDataset, open_dataset
from dit_jax.data.loader import batch_indices
from dit_jax.data.metadata import DataError
from dit_jax.data.shard_cache import ROOM, ShardCache, open_cache

SIZE = 1000


@pytest.fixture
def shards(tmp_path):
    """Eight files of SIZE bytes: (path, size, checksum) of each."""
    found = []
    for number in range(8):
        data = bytes([number]) * SIZE
        path = tmp_path / "source" / f"shard-{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        found.append((path, SIZE, hashlib.sha256(data).hexdigest()))
    return found


class Counting:
    """A fetch that says what it has copied; `before` is called first."""

    def __init__(self, before=lambda: None):
        self.copied, self.before = [], before

    def __call__(self, shard, to):
        self.copied.append(os.path.basename(shard))
        self.before()
        shutil.copyfile(shard, to)


def use(cache, shard):
    """What a reader finds in the copy."""
    with cache.held(*shard) as local:
        return local.read_bytes()


def held(cache):
    """Names of the files in the cache."""
    return sorted(file.name for file in cache.folder.iterdir() if file.is_file())


def make(tmp_path, shards_held, fetch):
    folder = tmp_path / "cache"
    folder.mkdir(exist_ok=True)
    return ShardCache(folder, shards_held * SIZE, fetch)


def test_the_one_unused_for_longest_leaves(tmp_path, shards):
    fetch = Counting()
    cache = make(tmp_path, 3, fetch)
    for number in (0, 1, 2, 0, 3, 0, 2, 1):
        assert use(cache, shards[number]) == bytes([number]) * SIZE
        assert len(held(cache)) <= 3
    assert fetch.copied == [f"shard-{number}" for number in (0, 1, 2, 3, 1)]
    assert held(cache) == sorted(shards[number][2] for number in (0, 1, 2))


def test_a_shard_in_use_stays_and_an_open_one_can_be_read_on(tmp_path, shards):
    cache = make(tmp_path, 2, Counting())
    with cache.held(*shards[0]) as first, first.open("rb") as file:
        use(cache, shards[1])
        use(cache, shards[2])  # the first is older, but being opened
        assert held(cache) == sorted(shards[number][2] for number in (0, 2))
        opened = os.dup(file.fileno())
    use(cache, shards[3])
    assert shards[0][2] not in held(cache)
    assert os.pread(opened, SIZE, 0) == bytes(SIZE)
    os.close(opened)


def test_threads_copy_a_shard_once_and_never_pass_the_limit(tmp_path, shards):
    cache = make(tmp_path, 2, None)
    most = []

    def look():  # in the middle of a copy: what is there, and what is on its way
        with cache._lock(ROOM, fcntl.LOCK_SH):
            most.append(len(held(cache)))

    fetch = Counting(look)
    cache = dataclasses.replace(cache, fetch=fetch)
    together = threading.Barrier(8)

    def ask(thread):
        together.wait()
        for number in np.random.default_rng(thread).integers(0, 8, 40):
            assert use(cache, shards[number]) == bytes([number]) * SIZE

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert max(most) <= 2 and len(held(cache)) <= 2

    whole = dataclasses.replace(cache, limit=8 * SIZE, fetch=Counting())
    for file in held(cache):
        (cache.folder / file).unlink()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: use(whole, shards[number]), [i for i in range(8) for _ in range(8)]))
    assert sorted(whole.fetch.copied) == [f"shard-{number}" for number in range(8)]


KILLED = """
import pathlib, sys, time
from dit_jax.data.shard_cache import ShardCache
folder, shard, size, sha256 = sys.argv[1:]

def half(shard, to):
    to.write_bytes(b"half")
    print("copying", flush=True)
    sys.stdin.read()

with ShardCache(pathlib.Path(folder), 2000, half).held(shard, int(size), sha256):
    pass
"""


def test_what_a_killed_process_left_is_copied_anew_and_a_living_one_is_waited_for(tmp_path, shards):
    fetch = Counting()
    cache = make(tmp_path, 2, fetch)
    words = [cache.folder, *map(str, shards[0])]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "copying\n"
        use(cache, shards[1])
        with ThreadPoolExecutor(1) as pool:
            use(cache, shards[2])  # has no room beside both: the older one leaves, not what is being copied
            assert len(held(cache)) == 2
            waiting = pool.submit(use, cache, shards[0])
            assert "shard-0" not in fetch.copied  # the other process holds it
            other.send_signal(signal.SIGKILL)
            assert waiting.result(timeout=120) == bytes(SIZE)
    assert fetch.copied == ["shard-1", "shard-2", "shard-0"]
    (cache.folder / f"{shards[5][2]}-{SIZE}.part").write_bytes(b"half")  # of one that nobody asks for again
    use(cache, shards[3])
    use(cache, shards[4])
    assert held(cache) == sorted(shards[number][2] for number in (3, 4))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda data: data[:-1], "its copy has 999 bytes; metadata.json says 1000"),
     (lambda data: b"x" + data[1:], "its copy has SHA-256 [0-9a-f]{64}; metadata.json says [0-9a-f]{64}")],
)  # fmt: skip
def test_a_damaged_copy_is_refused_and_leaves_nothing(tmp_path, shards, damage, message):
    path, _, _ = shards[0]
    path.write_bytes(damage(path.read_bytes()))
    cache = make(tmp_path, 2, Counting())
    with pytest.raises(ValueError, match=message):
        use(cache, shards[0])
    assert held(cache) == []
    with pytest.raises(ValueError, match="its 3000 bytes are more than the local cache holds, 2000"):
        use(cache, (path, 3 * SIZE, "0" * 64))


# ------------------------------------------------------------------------------------ datasets, runs


@pytest.fixture(scope="module")
def folder(random_source, fake_encoder, tmp_path_factory):
    """A dataset of 128 records in 16 shards."""
    out = tmp_path_factory.mktemp("set") / "latents"
    prepare(random_source(count=128), fake_encoder(), out, image_size=16, shard_size=8, batch_size=1)
    return out


def config_of(folder, cache, gb):
    data = DataConfig(dir=str(folder), local_cache=str(cache), local_cache_gb=gb)
    config = Config(data=data)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, input_size=(4, 4), in_channels=2, num_classes=5)
    )


def test_a_dataset_reads_the_same_through_a_cache_and_says_what_it_costs(folder, tmp_path):
    """With half of 16 shards cached, more than half a shard is copied for every record of random batches of 16."""
    plain, fetch = LatentDataset(folder), Counting()
    size = max(plain.metadata.shard_bytes)
    (tmp_path / "cache").mkdir()
    found = {}
    for shards_held in (16, 8):
        fetch = Counting()
        cache = ShardCache(tmp_path / "cache", shards_held * size, fetch)
        cache.trim()
        dataset = LatentDataset(folder, cache=cache)
        for step in range(16):
            rows = batch_indices(0, step, 16, 128)
            given = dataset.read(rows)
            for name, values in plain.read(rows).items():
                np.testing.assert_array_equal(given[name], values)
            assert len(held(cache)) <= shards_held
        found[shards_held] = len(fetch.copied) / 256
    print(f"shards copied for each record: {found[16]:.3f} with all cached, {found[8]:.3f} with half of them")
    assert found[16] == 1 / 16 and 0.25 < found[8] < 0.75
    copy = pickle.loads(pickle.dumps(LatentDataset(folder, cache=ShardCache(tmp_path / "cache", 16 * size))))
    np.testing.assert_array_equal(copy.read([77])["moments"], plain.read([77])["moments"])


def test_a_damaged_shard_is_one_sentence(folder, tmp_path):
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "cache").mkdir()
    dataset = LatentDataset(tmp_path, cache=ShardCache(tmp_path / "cache", 10**9))
    shard = dataset.shard(3)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"00003-of-00016 cannot be read: its copy has SHA-256 .*; metadata"):
        dataset.read([24])


def test_a_run_reads_through_the_cache_that_it_names(folder, tmp_path):
    cache = tmp_path / "new" / "cache"
    dataset = open_dataset(config_of(folder, cache, 0.5))
    dataset.read(np.arange(0, 128, 8))
    assert len([file for file in cache.iterdir() if file.is_file()]) == 16


def test_limits_that_do_not_serve_are_refused(folder, tmp_path):
    with pytest.raises(
        ConfigError, match=r"--data.local-cache-gb is 1e-06; expected room for the largest shard of"
    ):
        open_dataset(config_of(folder, tmp_path / "cache", 1e-6))
    with pytest.raises(
        ConfigError, match=r"--data.local-cache-gb is 1e\+09, but .* has room for .*; expected no"
    ):
        open_cache(config_of(folder, tmp_path / "cache", 1e9).data)
    with pytest.raises(ConfigError, match=r"--data.local-cache-gb is 0.0; expected a number above 0"):
        resolve(config_of(folder, tmp_path / "cache", 0.0))
    with pytest.raises(
        ConfigError, match=r"--data.local-cache is '/proc/none', where no file can be written"
    ):
        open_cache(config_of(folder, "/proc/none", 1.0).data)
    with pytest.raises(
        ConfigError, match=r"^--data.local-cache is gs://bucket/a; expected a folder of this host$"
    ):
        open_cache(config_of(folder, "gs://bucket/a", 1.0).data)
    assert open_cache(DataConfig()) is None
    assert "local_cache" not in to_json(Config())
    config = config_of(folder, tmp_path, 3.0)
    assert from_json(to_json(config)) == config
