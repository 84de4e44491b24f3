"""One of two processes is killed and its host lost: the run goes on from the copies, as if nothing had been."""

import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from started import joined, together, wait_for

from dit_jax.config import to_json
from dit_jax.runs.checkpoint import find_damage
from dit_jax.runs.log import read_lines
from dit_jax.training import launch, loop
from dit_jax.training.loop import train
from dit_jax.training.sharding import make_mesh


def on_two_hosts(file, local, *options):
    """For `together`: two `train.py`, each with a folder of its own for copies."""
    own = [("--train.local-checkpoint-dir", local / str(index)) for index in range(2)]
    return joined("train.py", "--config", file, *options, own=own)


def saving(checkpoints):
    """Steps whose save is under way."""
    return [int(name.partition(".")[0]) for name in os.listdir(checkpoints) if "tmp" in name]


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_its_host_is_lost(tiny, latents, tmp_path, monkeypatch, hurried):
    def config(name, **options):
        options = {"log_every": 1, "checkpoint_every": 4, "workdir": str(tmp_path / name)} | options
        return tiny.config(train=options, data={"dir": str(latents)}, mesh={"preset": "fsdp"})

    file, run, local = tmp_path / "config.json", tmp_path / "run", tmp_path / "local"
    file.write_text(to_json(config("run", steps=10**6, local_checkpoint_every=1)))
    saves, since = run / "checkpoints", []

    def kill_in_the_middle_of_a_save(*processes):
        wait_for(lambda: saves.is_dir() and max(saving(saves), default=0) >= 8, *processes)
        processes[0].kill()
        since.append(time.monotonic())

    _, other = together(
        on_two_hosts(file, local),
        code=(-signal.SIGKILL, launch.EXIT_STOPPED),
        meanwhile=kill_in_the_middle_of_a_save,
    )
    seconds = time.monotonic() - since[-1]
    print(f"ended after {seconds:.1f} s")
    assert seconds <= 60 and "process 0 of 2 is gone" in other.said, other.said
    steps = [int(p.name) for p in saves.iterdir() if p.name.isdigit()]
    assert all(find_damage(saves / str(step)) == "" for step in steps)
    shutil.rmtree(local / "0")

    total = read_lines(run / "metrics.jsonl")[-1]["step"] + 2
    said = together(on_two_hosts(file, local, "--train.steps", total))[0].said
    assert "from the copies on the hosts" in said, said
    resumed = int(said.partition("going on from step ")[2].split()[0])
    assert resumed > max(steps, default=0)

    # Beside a run of one process with as many devices that was never interrupted; both go on in one.
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:2]))
    losses = []
    for name in ("whole", "run"):
        state = train(config(name, steps=total + 2))
        losses.append(
            [(line["step"], line["loss"]) for line in read_lines(tmp_path / name / "metrics.jsonl")]
        )
        assert len(losses[-1]) == total + 2
        if name == "whole":
            whole = state
    assert losses[0] == losses[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), state, whole)
