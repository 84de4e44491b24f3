"""A run of two processes whose disk is a bucket: killed, it goes on to the bit."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

from dit_jax import paths
from dit_jax.config import to_json
from dit_jax.runs.checkpoint import find_damage
from dit_jax.runs.log import read_lines

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")

# Trains in one folder, then in another, where both processes are killed at a step: and again, where it goes on.
PROGRAM = """
import dataclasses, os, signal, sys
import jax

port, index, file, *folders = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
from dit_jax.config import load
from dit_jax.training import loop

batches, killed = loop.batches, False

def changed(dataset, batch_size, seed, start, *args):
    for step, batch in enumerate(batches(dataset, batch_size, seed, start, *args), start=start):
        if killed and step == 6:
            jax.block_until_ready(batch)
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

loop.batches = changed
config = load(file)
for folder in folders:
    killed = folder == folders[-1] and len(folders) > 1
    loop.train(dataclasses.replace(config, train=dataclasses.replace(config.train, workdir=folder)))
"""


def start(file, folders):
    """Exit codes and stderr of two processes that train in these folders."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache/jax"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(index), str(file), *folders],
            env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_goes_on_to_the_bit(google, tiny, latents, tmp_path):
    bucket = google.bucket()
    for name, file in paths.files_below(latents).items():
        paths.upload(file, paths.to_path(f"{bucket}/set") / name)
    config = tiny.config(
        train={"steps": 8, "log_every": 1, "checkpoint_every": 2}, data={"dir": f"{bucket}/set"}
    )
    file = tmp_path / "config.json"
    file.write_text(
        to_json(dataclasses.replace(config, train=dataclasses.replace(config.train, workdir="none")))
    )
    whole, broken = f"{bucket}/whole", f"{bucket}/broken"
    codes, said = start(file, [whole, broken])
    assert codes == [-signal.SIGKILL] * 2, "".join(said)
    assert [line["step"] for line in read_lines(paths.to_path(broken) / "metrics.jsonl")][-1] < 8
    codes, said = start(file, [broken])
    assert codes == [0, 0], "".join(said)
    assert re.search(rf"going on from step [246] in {broken}\n", said[0]), said[0]
    losses = [
        [
            (line["step"], line["loss"])
            for line in read_lines(paths.to_path(folder) / "metrics.jsonl")
            if "loss" in line
        ]
        for folder in (whole, broken)
    ]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == list(range(1, 9))
    for folder in (whole, broken):
        assert find_damage(paths.to_path(folder) / "checkpoints" / "8") == ""
        assert json.loads(paths.read_bytes(paths.to_path(folder) / "config.json"))["train"]["steps"] == 8
    assert not (ROOT / "gs:").exists()
