"""More shards than a process may open files."""

import subprocess
import sys

import numpy as np
import pytest

from dit_jax.data.encode import prepare
from dit_jax.data.latents import LatentDataset

SHARDS, FILES = 50, 40
PROGRAM = """
import resource, sys, threading
import numpy as np
from dit_jax.data.latents import LatentDataset

files, folder, expected = int(sys.argv[1]), sys.argv[2], dict(np.load(sys.argv[3]))
resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
dataset, errors = LatentDataset(folder), []

def read(seed):
    try:
        for rows in np.random.default_rng(seed).integers(0, len(dataset), (20, 16)):
            for name, value in dataset.read(rows).items():
                np.testing.assert_array_equal(value, expected[name][rows])
    except Exception as error:
        errors.append(error)

threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not errors, errors
"""


@pytest.mark.slow
def test_many_threads_read_more_shards_than_files_may_be_open(random_source, fake_encoder, tmp_path):
    """Readers close while others are in use; what is read stays right."""
    prepare(
        random_source(SHARDS), fake_encoder(), tmp_path / "set", image_size=16, shard_size=1, batch_size=1
    )
    np.savez(tmp_path / "expected.npz", **LatentDataset(tmp_path / "set").read(range(SHARDS)))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(FILES), tmp_path / "set", tmp_path / "expected.npz"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
