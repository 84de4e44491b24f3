"""A long run with a fault every minute: does it end as if nothing had been, and is its memory flat?

The digits recipe with a constant learning rate, on eight virtual devices, with checkpoints and emergency copies.
(python tools/inject_faults.py --soak MINUTES)
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import random
import runpy
import shutil
import signal
import tempfile
import time

import inject_faults as faults

from dit_jax.config import Config, resolve
from dit_jax.runs.log import read_lines

MINUTE = 60.0
SAMPLE_SECONDS = 5.0
SETTLED_SECONDS = 20.0  # after the first sign of life: compilers and caches have what they need
GROWTH = 1.1  # of the memory of one process, from then on
KINDS = (
    "kill -9",
    "SIGTERM",
    "kill -9, checkpoint damaged",
    "kill -9, copies lost",
    "pause",
    "wall clock set",
)


def make_config(root: pathlib.Path, name: str, steps: int = 10**6) -> Config:
    """The recipe, in root/name."""
    recipe = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "configs" / "digits.py"))["config"]
    train = dataclasses.replace(
        recipe.train, workdir=str(root / name), steps=steps, log_every=10, checkpoint_every=50, sample_every=0,
        local_checkpoint_every=5, local_checkpoint_dir=str(root / "local"),
    )  # fmt: skip
    data = dataclasses.replace(recipe.data, dir=str(root / "digits"))
    optim = dataclasses.replace(recipe.optim, schedule="constant")
    return resolve(dataclasses.replace(recipe, train=train, data=data, optim=optim))


def memory(pid: int) -> float:
    """Resident memory of a process, in MB; 0 when it is gone."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return int((status.partition("VmRSS:")[2].split() or ["0"])[0]) / 1024


class Life:
    """One process of the run and what it took of memory, from when it had settled."""

    def __init__(self, config: Config) -> None:
        self.clock = faults.CONTEXT.Value("d", 0.0)
        self.child = faults.Child(config, faults.Setting(clock=self.clock))
        self.memory: list[float] = []
        self._settled: float | None = None

    def watch(self, until: float) -> None:
        """Look at it until then, or until it has ended."""
        while time.monotonic() < until and self.child.process.is_alive():
            time.sleep(min(SAMPLE_SECONDS, max(0.0, until - time.monotonic())))
            if self._settled is None and "img/s" in self.child.output:
                self._settled = time.monotonic() + SETTLED_SECONDS
            if self._settled is not None and time.monotonic() > self._settled:
                self.memory.append(memory(self.child.process.pid or 0))
        self.memory = [size for size in self.memory if size]

    def suffer(self, kind: str, root: pathlib.Path, rng: random.Random) -> bool:
        """Whether it lives on."""
        pid = self.child.process.pid or 0
        if kind == "pause":
            os.kill(pid, signal.SIGSTOP)
            time.sleep(SAMPLE_SECONDS)
            os.kill(pid, signal.SIGCONT)
        elif kind == "wall clock set":
            self.clock.value = rng.uniform(-86400, 0)  # ahead in a save would cost the save
        elif kind == "SIGTERM":
            os.kill(pid, signal.SIGTERM)
            self.child.finish()
        else:
            self.child.kill()
        steps = faults.finished_steps(self.child.workdir)
        if "damaged" in kind and len(steps) > 1:
            faults.flip_bit(faults.largest(self.child.workdir / "checkpoints" / str(steps[-1])), rng)
        if "lost" in kind:
            shutil.rmtree(root / "local", ignore_errors=True)
        return kind in ("pause", "wall clock set")


def main(minutes: float, rng: random.Random) -> int:
    """Soak, then compare with an undisturbed run; 0 if state and log are equal to the bit and memory is flat."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    faults.CONTEXT.set_forkserver_preload(["dit_jax.training.loop", "orbax.checkpoint", "grain"])
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        end, problems, life, number = time.monotonic() + MINUTE * minutes, [], None, 0
        while time.monotonic() < end:
            life = life or Life(make_config(root, "run"))
            life.watch(min(end, time.monotonic() + MINUTE))
            lines, kind, number = read_lines(root / "run" / "metrics.jsonl"), rng.choice(KINDS), number + 1
            if not life.child.process.is_alive() or "Traceback" in life.child.output:
                problems.append(f"ended by itself: {life.child.output[-300:]}")
            first, last = (life.memory or [0.0])[0], (life.memory or [0.0])[-1]
            step = int(lines[-1]["step"]) if lines else 0
            print(f"{number}: step {step}, memory {first:.0f} -> {last:.0f} MB, then {kind}", flush=True)
            if last > GROWTH * first:
                problems.append(f"memory grew from {first:.0f} to {last:.0f} MB")
            life = life if life.suffer(kind, root, rng) else None
        if life is not None:
            life.child.kill()
        total = max(int(read_lines(root / "run" / "metrics.jsonl")[-1]["step"]), 10) + 10
        for name in ("run", "whole"):
            config = make_config(root, name, total)
            child = faults.Child(config)
            child.process.join(MINUTE * (minutes + 10))
            code, output = child.finish()
            if code != 0:
                problems.append(f"{name} did not finish: {output[-300:]}")
        run, whole = root / "run", root / "whole"
        if not problems and not (
            faults.same_state(run, whole, total) and faults.log(run) == faults.log(whole)
        ):
            problems.append("state or log differ from those of the undisturbed run")
        loss = faults.log(run)[-1].get("loss")
        summary = [text for text in output.splitlines() if text.startswith("goodput")]
        print(
            f"{number} faults in {total} steps; last loss {loss}; {'; '.join(problems) or 'equal to the bit'}"
        )
        print("undisturbed:", *summary)
    return int(bool(problems))
