"""Two processes with four devices each: each reads its own rows alone, and together they hold the same batches."""

import numpy as np
import pytest
from datasets_like import copy_with
from started import together

from dit_jax.conditions import TextCondition
from dit_jax.data.captions import caption_words
from dit_jax.data.encode import prepare
from dit_jax.data.latents import LatentDataset
from dit_jax.data.loader import batch_indices, order_of
from dit_jax.data.mixture import Mixture

PROGRAM = """
import contextlib, itertools, sys
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, rank, folder, wide, out = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from dit_jax.conditions import TextCondition
from dit_jax.config import ConfigError
from dit_jax.data import latents, loader
from dit_jax.data.loader import batches
from dit_jax.data.mixture import Mixture

# Interleaved devices: the rows of a process are not contiguous.
devices = np.array(jax.devices()).reshape(2, 4).T.reshape(-1)
sharding = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data"))
asked, found = [], {}
for cache, text in itertools.product(("none", "ram", "device"), (False, True)):
    dataset = latents.LatentDataset(folder, condition=TextCondition("bytes", 16) if text else None)
    read = dataset.read
    dataset.read = lambda rows, *words: asked.append(len(rows)) or read(rows, *words)
    with contextlib.closing(batches(dataset, 16, 3, 5, sharding, cache)) as stream:
        for step, batch in enumerate(itertools.islice(stream, 3)):
            for name, value in batch.items():
                assert value.shape[0] == 16
                for shard in value.addressable_shards:
                    rows = range(*shard.index[0].indices(16))
                    for row, data in zip(rows, np.asarray(shard.data)):
                        found[f"{cache}/{step}/{name}/{row}"] = data
    if cache == "none":
        assert set(asked) == {8}, asked
mixture = Mixture([latents.LatentDataset(folder), latents.LatentDataset(wide)], (1, 2))  # of two sizes
with contextlib.closing(batches(mixture, 16, 3, 5, sharding)) as stream:
    for step, batch in enumerate(itertools.islice(stream, 3)):
        for shard in batch["moments"].addressable_shards:
            for row, data in zip(range(*shard.index[0].indices(16)), np.asarray(shard.data)):
                found[f"mixture/{step}/{row}"] = data
np.savez(out, **found)

# Room for one copy of the set in the memory of this host, but not for one in each process.
loader.host_memory = lambda: 75 << 20
latents.LatentDataset.record_bytes = 2**20  # of each record
try:
    batches(dataset, 16, 0, 0, sharding, "ram")
    raise SystemExit("not refused")
except ConfigError as error:
    assert "in 2 processes on a host" in str(error), error
"""


@pytest.mark.slow
def test_two_processes_hold_the_rows_of_one(random_source, fake_encoder, tmp_path):
    source = random_source(count=50)
    source._captions = [[f"{i}.{k}" for k in range(1 + i % 4)] for i in range(50)]
    source.has_captions = True
    prepare(source, fake_encoder(), tmp_path / "set", image_size=16, shard_size=16, batch_size=1)
    folders = tmp_path / "set", tmp_path / "wide"
    copy_with(*folders, latent_shape=(2, 8, 2))

    def arguments(address, rank):
        return "-c", PROGRAM, address, rank, *folders, tmp_path / f"{rank}.npz"

    together(arguments, devices=4)
    parts = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(2)]
    assert not parts[0].keys() & parts[1].keys()
    found = parts[0] | parts[1]
    dataset = LatentDataset(tmp_path / "set")
    captioned = LatentDataset(tmp_path / "set", condition=TextCondition("bytes", 16))
    for step in range(3):
        rows = batch_indices(3, 5 + step, 16, 50)
        expected = dataset.read(rows) | captioned.read(rows, caption_words(3, 5 + step, 16))
        for cache in ("none", "ram", "device"):
            for name, value in expected.items():
                rows = np.stack([found[f"{cache}/{step}/{name}/{row}"] for row in range(16)])
                np.testing.assert_array_equal(rows, value)
    mixture = Mixture([LatentDataset(folder) for folder in folders], (1, 2))
    order, sizes = order_of(mixture, 16, 3, 5, "sorted"), set()
    for step in range(3):
        expected = mixture.read(order[step])["moments"]
        sizes.add(expected.shape[2:4])
        np.testing.assert_array_equal([found[f"mixture/{step}/{row}"] for row in range(16)], expected)
    assert sizes == {(4, 4), (2, 8)}
