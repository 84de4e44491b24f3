"""A run of two processes whose disk is a bucket: killed, it goes on to the bit."""

import dataclasses
import json
import re
import signal

import pytest
from started import ROOT, together

from dit_jax import paths
from dit_jax.config import to_json
from dit_jax.runs.checkpoint import find_damage
from dit_jax.runs.log import read_lines

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")

# Trains in one folder, then in another, where both processes are killed at a step: and again, where it goes on.
PROGRAM = """
import dataclasses, os, signal, sys
import jax

address, index, file, *folders = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
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


def two(file, *folders):
    """Arguments of two processes that train in these folders."""
    return lambda address, index: ("-c", PROGRAM, address, index, file, *folders)


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
    together(two(file, whole, broken), code=-signal.SIGKILL)
    assert [line["step"] for line in read_lines(paths.to_path(broken) / "metrics.jsonl")][-1] < 8
    said = together(two(file, broken))[0].err
    assert re.search(rf"going on from step [246] in {broken}\n", said), said
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
