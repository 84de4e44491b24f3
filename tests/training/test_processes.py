"""Whole runs of several processes: a checkpoint at a line of the log, samples, resume, a rollback, SIGTERM."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from dit_jax.config import to_json
from dit_jax.runs.checkpoint import find_damage
from dit_jax.runs.log import read_lines

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
import dataclasses, json, os, signal, sys
import jax, numpy as np

port, count, index, file = sys.argv[1:]
index = int(index)
jax.distributed.initialize(f"127.0.0.1:{port}", int(count), index)
from dit_jax.config import load
from dit_jax.generation import decoding, sampling
from dit_jax.training import loop

bad, last = {5, 6, 7}, None  # steps of the data whose moments are not finite; the one at which SIGTERM comes
batches = loop.batches

def changed(dataset, batch_size, seed, start, *args):
    for step, batch in enumerate(batches(dataset, batch_size, seed, start, *args), start=start):
        if step == last and index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch | {"moments": batch["moments"] * np.float16("nan")} if step in bad else batch

def run(**options):
    config = load(file)
    state = loop.train(dataclasses.replace(config, train=dataclasses.replace(config.train, **options)))
    return [int(x) for x in (state.step, state.data_offset, state.skipped)]

loop.batches = changed
def out_of_memory(*args):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

def blank(*_):
    return lambda latents: np.zeros((len(latents), 4, 4, 3), np.uint8)

decoding.load_decoder = sampling.load_decoder = blank
found = [run(steps=4)]
sampling.load_decoder = lambda *_: out_of_memory  # on process 0 alone, between two batches of samples
found.append(run(steps=8))
sampling.make_latent_sampler = lambda *_: out_of_memory
last = 15
found.append(run(steps=10**6))
print(json.dumps(found))
"""


def run_all(count, devices, config, folder):
    """The exit codes and (stdout, stderr) of `count` processes that run PROGRAM in a new folder."""
    folder.mkdir()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, workdir=str(folder / "run")))
    file = folder / "config.json"
    file.write_text(to_json(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache/jax")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(count), str(index), str(file)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for index in range(count)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 1), (4, 2)])
def test_a_run_of_several_processes_survives_what_happens_to_runs(count, devices, tiny, latents, tmp_path):
    options = {"log_every": 1, "checkpoint_every": 2, "bad_steps": 2}
    samples = {"sample_every": 4, "sample_steps": 2, "sample_count": 130}
    config = tiny.config(train=options | samples, data={"dir": str(latents)})
    for attempt in range(3):
        codes, outputs = run_all(count, devices, config, tmp_path / str(attempt))
        # Gloo gives a process 30 s to compile what another has compiled; on a loaded machine it may take longer.
        if not any("Gloo context initialization failed" in out[1] for out in outputs):
            break
    assert codes == [0] * count, "".join(out[1] for out in outputs)
    found = [json.loads(out[0].splitlines()[-1]) for out in outputs]  # Gloo has its say before
    assert all(other == found[0] for other in found)
    first, rolled_back, stopped = found[0]
    # Back from step 7 to 4 with the data of step 7, the last bad one, which is skipped.
    assert (first, rolled_back) == ([4, 0, 0], [8, 3, 1])
    assert 12 < stopped[0] < 10**6
    run = tmp_path / str(attempt) / "run"
    assert outputs[0][1].count("going back to step 4") == 1
    assert not any("going back" in out[1] for out in outputs[1:])
    assert [path.name for path in (run / "samples").iterdir()] == ["0000004.png"]
    for step in (8, 12):
        assert (
            outputs[0][1].count(f"no grid of samples at step {step}: RESOURCE_EXHAUSTED: Out of memory") == 1
        )
    assert find_damage(run / "checkpoints" / str(stopped[0])) == ""
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, stopped[0] + 1))
    assert [line["step"] for line in lines if "loss" not in line] == [5]  # its update was left out
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
