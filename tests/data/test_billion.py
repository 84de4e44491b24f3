"""Sets too large to be ordered, or looked through, in memory."""

import dataclasses
import os
import tracemalloc

import numpy as np
import pytest

from dit_jax.data import latents as room
from dit_jax.data.latents import LatentDataset
from dit_jax.data.loader import KEYED_FROM, Order, batch_indices, keyed_order, order_kind
from dit_jax.data.metadata import METADATA_FILE, DataError, load_metadata, shard_name
from dit_jax.training import loop

N = 10**9


def test_an_epoch_is_a_permutation():
    for n, seed in ((1, 0), (2, 0), (10, 2**63), (1000, 7)):
        for epoch in (0, 5):
            assert sorted(keyed_order(seed, epoch, n, np.arange(n))) == list(range(n))
    first = keyed_order(0, 0, 1000, np.arange(1000))
    for other in (keyed_order(1, 0, 1000, np.arange(1000)), keyed_order(0, 1, 1000, np.arange(1000))):
        assert np.mean(first == other) < 0.05
    # Fixed: a run of months must not change its order with a library.
    assert keyed_order(0, 0, N, np.arange(4)).tolist() == [33184297, 177468855, 209433602, 281978308]


def test_batches_of_a_billion_are_uniform_and_never_repeat():
    stream = np.concatenate([batch_indices(3, step, 4096, N, "keyed") for step in range(25)])
    assert len(np.unique(stream)) == len(stream) and stream.min() >= 0 and stream.max() < N
    counts = np.bincount(stream // (N // 100), minlength=100)
    assert np.abs(counts - 1024).max() < 5 * np.sqrt(1024)
    assert abs(np.corrcoef(stream[:-1], stream[1:])[0, 1]) < 5 / np.sqrt(len(stream))


def test_batches_straddle_epochs():
    stream = np.concatenate([batch_indices(0, step, 24, 10, "keyed") for step in range(5)])
    for epoch in range(12):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))
    np.testing.assert_array_equal(Order(0, 24, 10, 3, "keyed")[1], batch_indices(0, 4, 24, 10, "keyed"))


def test_only_large_sets_are_ordered_so():
    assert order_kind(KEYED_FROM - 1) == "sorted" and order_kind(KEYED_FROM) == order_kind(N) == "keyed"


@pytest.mark.slow
def test_a_run_keeps_the_order_that_it_began_with(tiny, latents, tmp_path, monkeypatch):
    """Begun as before there was a choice, it goes on so; a new one on the same set is ordered by a key."""
    asked = []
    batches = loop.batches

    def watched(*args):
        asked.append(args[-1])
        return batches(*args)

    def run(name, steps):
        options = {"workdir": str(tmp_path / name), "steps": steps}
        return loop.train(tiny.config(train=options, data={"dir": str(latents)}))

    monkeypatch.setattr(loop, "batches", watched)
    run("old", 2)
    monkeypatch.setattr(loop, "order_kind", lambda n: "keyed")
    run("old", 4)
    run("new", 2)
    monkeypatch.setattr(loop, "order_kind", lambda n: "sorted")
    run("new", 4)
    assert asked == ["sorted", "sorted", "keyed", "keyed"]


@pytest.fixture
def billion(latents, tmp_path):
    """10^9 records in 10^5 shards, by metadata and names of files; each shard is a link to one of 16 records."""
    m = load_metadata(latents)
    shards = 100_000
    large = dataclasses.replace(
        m, source_count=N, shard_size=N // shards, count=N, shard_counts=(N // shards,) * shards,
        shard_bytes=(m.shard_bytes[0],) * shards, shard_sha256=(m.shard_sha256[0],) * shards,
    )  # fmt: skip
    (tmp_path / METADATA_FILE).write_text(large.to_json())
    for number in range(shards):
        os.symlink(latents / shard_name(0, m.num_shards), tmp_path / shard_name(number, shards))
    return tmp_path


@pytest.mark.slow
def test_a_billion_records_are_opened_without_looking_at_them(billion, monkeypatch):
    opened = []
    open_one = room._open

    def counted(file, size):
        opened.append(file)
        return open_one(file, size)

    monkeypatch.setattr(room, "_open", counted)
    tracemalloc.start()
    dataset = LatentDataset(billion)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(dataset) == N and len(opened) == 1
    assert held < 300e6
    rows = 10_000 * keyed_order(0, 0, 100_000, np.arange(40))  # first records of forty shards
    assert np.isfinite(dataset.read(rows)["moments"]).all() and len(opened) <= 41
    missing = billion / shard_name(77, 100_000)
    missing.unlink()
    with pytest.raises(
        DataError, match=r"array_record-00077-of-100000 has no file bytes; metadata.json says"
    ):
        LatentDataset(billion)
    missing.write_bytes(b"short")
    with pytest.raises(
        DataError, match=r"00077-of-100000 cannot be read: it has 5 bytes; metadata.json says"
    ):
        LatentDataset(billion).read([770_000])
