"""Whole runs of several processes: a checkpoint at a line of the log, samples, resume, a rollback, SIGTERM."""

import json
import shutil

import numpy as np
import pytest
from started import together

from dit_jax.config import to_json
from dit_jax.runs.checkpoint import find_damage
from dit_jax.runs.log import read_lines

PROGRAM = """
import dataclasses, json, os, signal, sys
import jax, numpy as np

address, count, index, file = sys.argv[1:]
index = int(index)
jax.distributed.initialize(address, int(count), index)
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


@pytest.mark.slow
def test_a_run_of_several_processes_survives_what_happens_to_runs(tiny, latents, tmp_path):
    count, run = 3, tmp_path / "run"
    options = {"log_every": 1, "checkpoint_every": 2, "bad_steps": 2}
    samples = {"sample_every": 4, "sample_steps": 2, "sample_count": 130}
    config = tiny.config(
        train={"workdir": str(run), "batch_size": 12} | options | samples, data={"dir": str(latents)}
    )
    file = tmp_path / "config.json"
    file.write_text(to_json(config))

    def arguments(address, index):
        shutil.rmtree(run, ignore_errors=True)  # also of a start that came to nothing
        return "-c", PROGRAM, address, count, index, file

    processes = together(arguments, count)
    found = [json.loads(process.out.splitlines()[-1]) for process in processes]  # Gloo has its say before
    assert all(other == found[0] for other in found)
    first, rolled_back, stopped = found[0]
    # Back from step 7 to 4 with the data of step 7, the last bad one, which is skipped.
    assert (first, rolled_back) == ([4, 0, 0], [8, 3, 1])
    assert 12 < stopped[0] < 10**6
    assert processes[0].err.count("going back to step 4") == 1
    assert not any("going back" in process.err for process in processes[1:])
    assert [path.name for path in (run / "samples").iterdir()] == ["0000004.png"]
    for step in (8, 12):
        assert (
            processes[0].err.count(f"no grid of samples at step {step}: RESOURCE_EXHAUSTED: Out of memory")
            == 1
        )
    assert find_damage(run / "checkpoints" / str(stopped[0])) == ""
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, stopped[0] + 1))
    assert [line["step"] for line in lines if "loss" not in line] == [5]  # its update was left out
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
