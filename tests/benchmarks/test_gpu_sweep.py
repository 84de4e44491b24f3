"""The GPU sweep at tiny sizes on a CPU: what works has a figure, what fails is said, and neither runs twice."""

import os
import pathlib
import re
import subprocess
import sys

import gpu_sweep
import pytest
from started import environment

ROOT = pathlib.Path(__file__).parent.parent.parent
SWEEP = [sys.executable, str(ROOT / "benchmarks" / "gpu_sweep.py")]


def sweep(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SWEEP, *options], env=environment(), capture_output=True, text=True, cwd=ROOT)


def test_every_variant_has_a_name_and_options_of_its_own():
    variants = list(gpu_sweep.variants())
    assert len({v.name for v in variants}) == len(variants)
    assert len({(v.script, v.options, v.flags) for v in variants}) == len(variants)


@pytest.mark.slow
def test_a_variant_that_fails_does_not_end_the_sweep(tmp_path):
    # No cuDNN on a CPU: the first variant fails in the order of the sweep before the second is run.
    options = ["--out", str(tmp_path), "--smoke", "--only", "attention-cudnn", "flags-latency-hiding"]
    done = sweep(*options)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "smoke"
    assert "cudnn" in (out / "attention-cudnn.failed").read_text().lower()
    assert not (out / "attention-cudnn.json").exists()
    assert (out / "flags-latency-hiding.json").exists()
    table = (out / "table.md").read_text()
    assert "| attention-cudnn | failed: " in table
    assert "`--xla_gpu_enable_latency_hiding_scheduler=true` | 4 | " in table

    written = (out / "flags-latency-hiding.json").stat().st_mtime_ns
    again = sweep(*options)
    assert again.returncode == 0, again.stderr
    assert (out / "flags-latency-hiding.json").stat().st_mtime_ns == written
    assert "done" not in again.stderr and "failed:" not in again.stderr


def test_a_budget_leaves_the_rest_for_the_next_time(tmp_path):
    done = sweep("--out", str(tmp_path), "--smoke", "--only", "torch-plain", "--budget", "0")
    assert done.returncode == 0, done.stderr
    assert "the time is over" in done.stderr + done.stdout
    assert not list((tmp_path / "smoke").glob("torch-plain*"))


def test_an_unknown_variant_is_named(tmp_path):
    done = sweep("--out", str(tmp_path), "--only", "nothing")
    assert done.returncode == 2
    assert "--only is nothing; expected names that --list prints" in done.stderr


@pytest.mark.slow
def test_every_flag_is_known_to_the_compiler(tmp_path):
    listed = sweep("--out", str(tmp_path), "--list")
    assert listed.returncode == 0, listed.stderr
    flags = sorted(set(re.findall(r"--xla_\S+", listed.stdout)))
    assert len(flags) > 8
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    code = "import jax; jax.numpy.zeros(1)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
