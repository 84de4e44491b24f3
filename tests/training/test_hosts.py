"""One of two processes is killed and its host lost: the run goes on from the copies, as if nothing had been."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dit_jax.config import to_json
from dit_jax.runs.checkpoint import find_damage
from dit_jax.runs.log import read_lines
from dit_jax.training import loop
from dit_jax.training.loop import train
from dit_jax.training.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[2]


def start_two(file, local, *options):
    """Two `train.py` of one device each, each with a folder of its own for copies: they stand for two hosts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache/jax"), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    join = ("--coordinator", address, "--num-processes", "2", "--process-index")
    return [
        subprocess.Popen(
            [
                sys.executable, str(ROOT / "train.py"), "--config", str(file), *join, str(index),
                "--train.local-checkpoint-dir", str(local / str(index)), *options,
            ],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )
        for index in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_its_host_is_lost(tiny, latents, tmp_path, monkeypatch):
    def config(name, **options):
        options = {"log_every": 1, "checkpoint_every": 4, "workdir": str(tmp_path / name)} | options
        return tiny.config(train=options, data={"dir": str(latents)}, mesh={"preset": "fsdp"})

    file, run, local = tmp_path / "config.json", tmp_path / "run", tmp_path / "local"
    file.write_text(to_json(config("run", steps=10**6, local_checkpoint_every=1)))
    processes = start_two(file, local)
    try:
        saves = run / "checkpoints"
        while not (saves.is_dir() and any("tmp" in p.name and p.name[0] == "8" for p in saves.iterdir())):
            assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        processes[0].kill()  # in the middle of a save
        since = time.monotonic()
        said = processes[1].communicate(timeout=200)[0]
        print(f"ended after {time.monotonic() - since:.1f} s")
        assert processes[1].returncode == 75 and time.monotonic() - since <= 60, said
        assert "process 0 of 2 is gone" in said
        steps = [int(p.name) for p in saves.iterdir() if p.name.isdigit()]
        assert all(find_damage(saves / str(step)) == "" for step in steps)
        shutil.rmtree(local / "0")

        total = read_lines(run / "metrics.jsonl")[-1]["step"] + 2
        processes += start_two(file, local, "--train.steps", str(total))
        outputs = [process.communicate(timeout=200)[0] for process in processes[2:]]
        assert [process.returncode for process in processes[2:]] == [0, 0], "".join(outputs)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert "from the copies on the hosts" in outputs[0], outputs[0]
    resumed = int(outputs[0].partition("going on from step ")[2].split()[0])
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
