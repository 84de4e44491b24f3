"""Sides of a comparison in processes of their own: in turns, at rest while another is timed, left out or refused."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import workers

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
SCRIPT = """
import argparse, json, os, threading, time
import workers

def options():
    parser = argparse.ArgumentParser()
    workers.add_options(parser, ("none", "torch"))
    parser.add_argument("--diary")
    return parser.parse_args()

def note(args, *words):
    with open(args.diary, "a") as diary:
        print(*words, file=diary)

def prepare(args):
    if args.side == "reference":
        (args.exchange / "reference").write_text("seen")
        return {}, {}
    if args.peer_compile == "default":
        raise RuntimeError("no compiler here")

    def spin(start):
        while time.monotonic() < start + 0.3:
            pass
        note(args, args.side, "rests", time.monotonic())

    def run():
        note(args, args.side, "runs", time.monotonic())
        print("this is no answer")
        if args.side == "peer":  # as a pool of threads that waits for more
            threading.Thread(target=spin, args=(time.monotonic(),)).start()

    facts = {"pid": os.getpid(), "isa": os.environ.get("ATEN_CPU_CAPABILITY"), "xla": os.environ.get("XLA_FLAGS")}
    return facts | {"reference": (args.exchange / "reference").read_text()}, {"round": run}

args = options()
if args.side:
    workers.serve(lambda: prepare(args), dict)
else:
    with workers.started(args, workers.sides(args), reference=True) as ready:
        times = workers.in_turns(ready, "round", 3).times
        print(json.dumps({"times": times, "facts": {w.side.name: w.facts for w in ready}}))
"""


def compare(tmp_path, *options):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), "--peer", "torch", "--diary", str(tmp_path / "diary"), *options]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "XLA_FLAGS": "--one"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="states of threads are read from /proc (Linux)")
def test_sides_take_turns_in_processes_of_their_own_and_rest_meanwhile(tmp_path):
    done = compare(tmp_path, "--isa", "avx2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: len(seconds) for name, seconds in found["times"].items()} == {"jax": 3, "torch": 3}
    jax, torch = found["facts"]["jax"], found["facts"]["torch"]
    assert jax["pid"] != torch["pid"] and jax["reference"] == torch["reference"] == "seen"
    assert jax["isa"] == torch["isa"] == "avx2"
    for flags in (jax["xla"], torch["xla"]):  # YNNPACK would use AVX-512 all the same
        assert flags == "--one --xla_cpu_max_isa=AVX2 --xla_cpu_experimental_ynn_fusion_type="
    assert "torch-compiled ended with code 1: it is left out" in done.stderr
    assert "no compiler here" in done.stderr

    lines = [line.split() for line in (tmp_path / "diary").read_text().splitlines()]
    events = sorted((float(at), who, what) for who, what, at in lines)
    runs = [who for _, who, what in events if what == "runs"]
    assert runs[2:] == ["jax", "peer"] * 4  # after the run with which each began: one to warm up, three timed
    spinning = False
    for _, who, what in events:
        if who == "peer":
            spinning = what == "runs"
        else:
            assert not spinning, events


def test_a_compiled_side_that_was_asked_for_must_start(tmp_path):
    done = compare(tmp_path, "--peer-compile", "default")
    assert done.returncode == 1
    assert "no compiler here" in done.stderr and not done.stdout


def test_the_fastest_peer_counts():
    times = {"jax": [1.0, 1.0], "torch": [3.0, 5.0, 3.0], "torch-compiled": [2.0, 9.0, 2.0]}
    assert workers.fastest_peer(times) == "torch-compiled"
    assert workers.fastest_peer({"jax": [1.0]}) is None
