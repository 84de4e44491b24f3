"""Does a run survive what happens to runs? Kills it, damages its files, fills its disk; counts survivors.

    python tools/inject_faults.py                 # 50 kills: about 7 minutes on two CPU cores
    python tools/inject_faults.py --kills 500 --pair-kills 100 --repeats 20
    python tools/inject_faults.py --bucket google --kills 500     # the kills alone, of a run in a bucket
    python tools/inject_faults.py --soak 120      # the digits recipe, a fault every minute (tools/soak.py)

Each trial starts a small model on the digits in a process of its own. A kill (SIGKILL, at a random moment from
start-up on, with a save in progress most of the time) is survived when the next process goes on from the last
finished checkpoint, finds none damaged and starts no step over that one had kept. After the last kill the run is
completed and compared, to the bit, with one that was never interrupted. Prints a table and one line of JSON;
exits with 1 if anything was lost. The disks that fill up are mounted: by root, or in a namespace of its own
(`unshare -rm`), which the script enters by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import tqdm

from dit_jax import paths
from dit_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, TrainConfig, resolve

CONTEXT = multiprocessing.get_context("forkserver")
TIMEOUT = 300.0


def make_config(
    root: pathlib.Path, name: str = "run", steps: int = 10**6, runs: str = "", **data: str
) -> Config:
    """A two-layer model on the digits that saves every second step, in root/name or runs/name."""
    model = ModelConfig(
        name="DiT-S/2", depth=2, hidden_size=32, num_heads=2, input_size=(8, 8), in_channels=4, num_classes=10
    )
    options = {"dir": str(root / "digits"), "source": "digits"} | data
    config = Config(
        model=model,
        diffusion=DiffusionConfig(num_timesteps=100),
        data=DataConfig(mirror=False, **options),  # type: ignore[arg-type]
        optim=OptimConfig(ema_more=(0.9,)),
        train=TrainConfig(
            workdir=f"{runs or root}/{name}",
            batch_size=8,
            steps=steps,
            log_every=1,
            checkpoint_every=2,
            sample_every=0,
        ),
    )
    return resolve(config)


# ------------------------------------------------------------------------------- the process under test


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is peculiar to a process: how it joins others, steps of data that are not finite, a clock that is off."""

    join: tuple[str, ...] = ()
    nan_steps: tuple[int, ...] = ()
    clock: Any = None  # a shared number of seconds


def prepare_process(setting: Setting) -> None:
    """Make the process as the setting says."""
    from dit_jax.training import launch, loop

    if setting.clock is not None:
        real = time.time
        time.time = lambda: real() + setting.clock.value
    if setting.nan_steps:
        batches = loop.batches

        def poisoned(dataset: Any, size: int, seed: int, first: int, *rest: Any) -> Iterator[Any]:
            for step, batch in enumerate(batches(dataset, size, seed, first, *rest), start=first):
                bad = np.float16("nan" if step in setting.nan_steps else 1)
                yield batch | {"moments": batch["moments"] * bad}

        loop.batches = poisoned  # type: ignore[assignment]
    if setting.join:
        launch.initialize(launch.parse_launch(setting.join)[0])


def run_training(config: Config, output: Connection, setting: Setting) -> None:
    """Train, with stdout and stderr in a pipe."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    import jax

    jax.config.update("jax_platforms", "cpu")
    cache = pathlib.Path(config.data.dir).parent / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from dit_jax import processes
    from dit_jax.config import ConfigError
    from dit_jax.training.loop import train

    prepare_process(setting)
    try:
        state = train(config)
    except ConfigError as error:
        print(f"refused: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        processes.outlive(error)
        raise
    sys.exit(0 if int(state.step) >= config.train.steps else 75)


class Child:
    """One process that trains."""

    def __init__(self, config: Config, setting: Setting = Setting()) -> None:
        self.workdir = paths.to_path(config.train.workdir)
        self._read, write = CONTEXT.Pipe(duplex=False)
        self._output: list[bytes] = []
        self.process = CONTEXT.Process(target=run_training, args=(config, write, setting))
        self.process.start()
        write.close()
        self._reader = threading.Thread(target=self._collect)
        self._reader.start()

    def _collect(self) -> None:
        while data := os.read(self._read.fileno(), 65536):
            self._output.append(data)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return b"".join(self._output).decode()

    def finish(self) -> tuple[int | None, str]:
        """(exit code, output) once it has ended; it is killed when it hangs."""
        self.process.join(TIMEOUT)
        self.kill()
        return self.process.exitcode, self.output

    def wait_for_steps(self, count: int) -> None:
        """Return when it has logged `count` lines of its own, or has ended."""
        log, end = self.workdir / "metrics.jsonl", time.monotonic() + TIMEOUT
        if paths.is_remote(self.workdir):  # where the log comes late
            while len(set(re.findall(r"\| (\d+)/", self.output))) <= count:
                if not self.process.is_alive() or time.monotonic() > end:
                    return
                time.sleep(0.01)
            return
        while "going on from step" not in self.output and not log.exists():
            if not self.process.is_alive() or time.monotonic() > end:
                return
            time.sleep(0.01)
        first = _lines(log)
        while _lines(log) < first + count and self.process.is_alive() and time.monotonic() < end:
            time.sleep(0.002)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        self._reader.join()


def _lines(log: pathlib.Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def finished_steps(workdir: pathlib.Path) -> list[int]:
    """Steps of the checkpoints under their final names."""
    from dit_jax.runs.weights import checkpoint_steps

    return checkpoint_steps(workdir / "checkpoints")


def unfinished_saves(workdir: pathlib.Path) -> set[str]:
    """Names of checkpoints that were being written."""
    names = set(paths.names_in(workdir / "checkpoints"))
    return {name for name in names if "tmp" in name or name.isdigit()} - set(
        map(str, finished_steps(workdir))
    )


# ------------------------------------------------------------------------------------------------ trials


def trial_kills(
    root: pathlib.Path, kills: int, rng: random.Random, runs: str = ""
) -> tuple[int, int, list[str]]:
    """(survived, lost, notes): kill a run again and again, then compare it with an uninterrupted one."""
    config, notes, lost = make_config(root, runs=runs), [], 0
    workdir = paths.to_path(config.train.workdir)
    kept = 0
    during_saves = 0
    for number in tqdm.trange(kills, desc="kill -9", unit="kill"):
        child = Child(config)
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, 4))  # start-up, restore and compilation included
        else:
            child.wait_for_steps(rng.randint(1, 8))
            time.sleep(rng.uniform(0, 0.1))
        child.kill()
        output = child.output
        during_saves += bool(unfinished_saves(workdir))
        resumed = re.search(r"going on from step (\d+)", output)
        if "damaged" in output or "Traceback" in output or (resumed and int(resumed[1]) < kept):
            lost += 1
            notes.append(f"kill {number}: kept step {kept}, then: {output.strip()[-300:]}")
        kept = max(finished_steps(workdir), default=0)
    total = kept + 4
    code, output = Child(
        dataclasses.replace(config, train=dataclasses.replace(config.train, steps=total))
    ).finish()
    if code != 0:
        return kills - lost, lost + 1, [*notes, f"did not finish: {output[-300:]}"]
    whole = make_config(root, "whole", total)  # on the disk
    code, output = Child(whole).finish()
    if code != 0 or not same_state(workdir, root / "whole", total) or log(workdir) != log(root / "whole"):
        lost += 1
        notes.append("state or log after the kills differ from those of an uninterrupted run")
    notes.append(f"{during_saves} of {kills} kills left an unfinished save; compared after {total} steps")
    return kills - lost, lost, notes


def log(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a run's log, without what depends on the clock."""
    lines = [json.loads(line) for line in paths.read_bytes(workdir / "metrics.jsonl").splitlines()]
    clocked = ("images_per_second", "goodput", "time_")
    return [{k: v for k, v in line.items() if not k.startswith(clocked)} for line in lines]


def same_state(one: pathlib.Path, other: pathlib.Path, step: int) -> bool:
    """Whether two runs' checkpoints of a step are equal to the bit: parameters, averages and optimizer."""
    import jax
    import orbax.checkpoint as ocp

    from dit_jax.runs.saving import orbax_path

    def read(workdir: pathlib.Path, item: str) -> list[np.ndarray]:
        folder = orbax_path(workdir / "checkpoints" / str(step) / item)
        with ocp.StandardCheckpointer() as reader:
            shapes = reader.metadata(folder).item_metadata.tree
            like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
            return jax.tree.leaves(reader.restore(folder, like))

    return all(
        np.array_equal(a, b)
        for item in ("params", "ema", "rest")
        for a, b in zip(read(one, item), read(other, item), strict=True)
    )


def base_run(root: pathlib.Path) -> pathlib.Path:
    """A finished run of six steps, with checkpoints of steps 2, 4 and 6."""
    folder = root / "base"
    if not folder.exists():
        Child(make_config(root, "base", 6)).finish()
    return folder


def largest(folder: pathlib.Path) -> pathlib.Path:
    """The file with the most bytes below a folder."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bit(file: pathlib.Path, rng: random.Random) -> None:
    """Flip one random bit."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def trial_damage(damage: Callable[[pathlib.Path], None], root: pathlib.Path) -> str:
    """Damage the newest checkpoint; "" if the run falls back, says so and ends as if nothing had been."""
    base, run = base_run(root), root / "damaged"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(base, run)
    damage(run / "checkpoints" / "6")
    code, output = Child(make_config(root, "damaged", 6)).finish()
    if code != 0 or "checkpoint of step 6 is damaged" not in output or "going on from step 4" not in output:
        return output[-300:]
    return "" if same_state(run, base, 6) else "the state differs"


def trial_shard(root: pathlib.Path, rng: random.Random) -> str:
    """Flip a bit in the middle of a data shard; "" if training stops and names it."""
    copy = root / "bad_digits"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root / "digits", copy)
    shard = rng.choice(sorted(copy.glob("*.array_record-*")))
    flip_bit(shard, rng)
    config = make_config(root, "shard", 400, dir=str(copy))  # more than an epoch, without 200 saves
    seldom = dataclasses.replace(config.train, checkpoint_every=1000)
    code, output = Child(dataclasses.replace(config, train=seldom)).finish()
    return "" if code == 2 and shard.name in output else f"exit code {code}: {output[-300:]}"


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kilobytes: int) -> Iterator[None]:
    """Mount a file system of that size on a new folder; a PermissionError where this user cannot."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        raise PermissionError("a file system that can be full needs root, or `unshare -rm`, to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def trial_full_disk(root: pathlib.Path) -> str:
    """A disk with room for three checkpoints and no more; "" if they stay, nothing else is left of the failed saves,
    each is one line, and the run goes on once there is room."""
    base, run = base_run(root), root / "full"
    used = sum(-(-p.stat().st_size // 4096) * 4 for p in base.rglob("*") if p.is_file())
    with small_disk(run, used + 200):
        shutil.copytree(base, run, dirs_exist_ok=True)
        code, output = Child(make_config(root, "full", 10)).finish()
        failed = re.findall(r"checkpoint of step (\d+) could not be written", output)
        left = sorted(p.name for p in (run / "checkpoints").iterdir())
        if code != 2 or failed != ["8", "10"] or "Traceback" in output or left != ["2", "4", "6"]:
            return f"exit code {code}, checkpoints {left}: {output[-300:]}"
        subprocess.run(["mount", "-o", "remount,size=100m", str(run)], check=True)
        code, output = Child(make_config(root, "full", 10)).finish()
        return "" if code == 0 and "going on from step 6" in output else output[-300:]


def trial_full_from_the_start(root: pathlib.Path) -> str:
    """A disk with room for 8 kB; "" if a new run is refused in one sentence that names its folder."""
    base_run(root)  # prepares the dataset
    with small_disk(root / "none", 8):
        code, output = Child(make_config(root, "none", 8)).finish()
    return (
        "" if code == 2 and "refused: --train.workdir is" in output else f"exit code {code}: {output[-300:]}"
    )


def trial_contradiction(root: pathlib.Path) -> str:
    """Another learning rate in the same folder; "" if it is refused in one sentence."""
    base_run(root)
    config = make_config(root, "base", 8)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=0.5))
    code, output = Child(other).finish()
    return "" if code == 2 and "refused: --optim.learning-rate is 0.5" in output else output[-300:]


def trial_nans(root: pathlib.Path) -> str:
    """Data that are not finite, longer than the run is patient; "" if it goes back and ends with finite losses."""
    shutil.rmtree(root / "nans", ignore_errors=True)
    config = make_config(root, "nans", 8)
    patient = dataclasses.replace(config, train=dataclasses.replace(config.train, bad_steps=3))
    code, output = Child(patient, Setting(nan_steps=(1, 4, 5, 6, 7))).finish()
    losses = [line["loss"] for line in log(root / "nans") if "loss" in line]
    fine = code == 0 and "going back to step 4" in output and len(losses) >= 5 and np.isfinite(losses).all()
    return "" if fine else f"exit code {code}: {output[-300:]}"


def trial_clock(root: pathlib.Path, rng: random.Random) -> str:
    """The wall clock is set by up to a day between the two halves of a run; "" if it ends as if it had not been."""
    shutil.rmtree(root / "clock", ignore_errors=True)
    for steps in (4, 6):
        clock = CONTEXT.Value("d", rng.uniform(-86400, 86400))
        code, output = Child(make_config(root, "clock", steps), Setting(clock=clock)).finish()
        if code != 0:
            return f"exit code {code}: {output[-300:]}"
    same = same_state(root / "clock", base_run(root), 6) and log(root / "clock") == log(root / "base")
    return "" if same else "state or log differ"


def main() -> int:
    """Run all trials; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how often to kill the run")
    parser.add_argument("--pair-kills", type=int, default=0, help="how often to kill one of two processes")
    parser.add_argument("--repeats", type=int, default=1, help="how often to try each other fault")
    parser.add_argument(
        "--bucket",
        choices=("google", "amazon"),
        help="only the kills, in a bucket of a server that is started",
    )
    parser.add_argument(
        "--soak", type=float, metavar="MINUTES", help="only a long run with a fault every minute"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and of the damaged bits")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    if args.soak is not None:
        import soak

        return soak.main(args.soak, rng)
    CONTEXT.set_forkserver_preload(["dit_jax.training.loop", "orbax.checkpoint", "grain", "tensorboardX"])
    if args.bucket:
        return kill_in_a_bucket(args.bucket, args.kills, rng)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        base_run(root)  # prepares the dataset and compiles

        def truncate(f: pathlib.Path) -> None:
            largest(f).write_bytes(largest(f).read_bytes()[: rng.randrange(1, 1000)])

        files = {
            "truncated file": truncate,
            "flipped bit": lambda f: flip_bit(largest(f), rng),
            "flipped bit in any file": lambda f: flip_bit(
                rng.choice(
                    [p for p in sorted(f.rglob("*")) if p.is_file() and p.name != "_CHECKPOINT_METADATA"]
                ),
                rng,
            ),
            "missing file": lambda f: largest(f).unlink(),
        }
        trials: dict[str, Callable[[], str]] = {
            f"checkpoint with a {name}": lambda damage=damage: trial_damage(damage, root)  # type: ignore[misc]
            for name, damage in files.items()
        }
        trials["flipped bit in a data shard"] = lambda: trial_shard(root, rng)
        trials["disk full during saves"] = lambda: trial_full_disk(root)
        trials["disk full from the start"] = lambda: trial_full_from_the_start(root)
        trials["config contradicts the checkpoint"] = lambda: trial_contradiction(root)
        trials["data that are not finite"] = lambda: trial_nans(root)
        trials["wall clock set between two starts"] = lambda: trial_clock(root, rng)

        table = {}
        survived, lost, notes = trial_kills(root, args.kills, rng)
        table["kill -9 at a random moment"] = (survived, lost)
        if args.pair_kills:
            import pairs

            survived, lost, more = pairs.trial_pairs(root, args.pair_kills, rng)
            table["kill -9 of one of two processes"] = (survived, lost)
            notes += more
        for name, trial in tqdm.tqdm(trials.items(), desc="other faults"):
            try:
                problems = [trial() for _ in range(args.repeats)]
            except PermissionError as error:
                notes.append(f"{name}: left out: {error}")
                continue
            table[name] = (problems.count(""), len(problems) - problems.count(""))
            notes += [f"{name}: {problem}" for problem in problems if problem]
    return report(table, notes)


def kill_in_a_bucket(kind: str, kills: int, rng: random.Random) -> int:
    """The kills, of a run in a bucket of this kind; 0 if nothing was lost."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "servers"))
    import bucket_server

    with tempfile.TemporaryDirectory() as folder, getattr(bucket_server, kind)() as store:
        root = pathlib.Path(folder)
        base_run(root)
        survived, lost, notes = trial_kills(root, kills, rng, store.bucket())
    return report({f"kill -9 at a random moment, {store.scheme}://": (survived, lost)}, notes)


def report(table: dict[str, tuple[int, int]], notes: list[str]) -> int:
    """Print the table; 0 if nothing was lost."""
    print(f"{'fault':<42}{'survived':>10}{'lost':>6}")
    for name, (survived, lost) in table.items():
        print(f"{name:<42}{survived:>10}{lost:>6}")
    for note in notes:
        print(f"note: {note}")
    print(json.dumps({name: {"survived": s, "lost": x} for name, (s, x) in table.items()}))
    return int(any(lost for _, lost in table.values()))


if __name__ == "__main__":
    if os.geteuid() != 0 and shutil.which("unshare"):  # as root of a namespace of its own it may mount
        os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
