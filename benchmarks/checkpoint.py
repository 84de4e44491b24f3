"""What a checkpoint costs: the step that starts it, writing, checksums, checking, reading.

    python benchmarks/checkpoint.py --gigabytes 2 --dir /path/on/the/disk

Saves a synthetic state with this package's Checkpoints, in alternating rounds with and without its list of checksums;
what else is written is the same. The checksums are computed beside training, before the checkpoint counts. Files are
in the system's cache when they are checked and read; `restore` checks first.
"""

import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dit_jax.runs import checkpoint
from dit_jax.runs.checkpoint import Checkpoints, find_damage
from dit_jax.runs.state import TrainState

ARRAYS = 64  # that the state is made of
KINDS = 4  # parameters, their average, and Adam's two moments: equal shares


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure checkpoints."""

    gigabytes: float = 2.0
    """Size of the state."""
    dir: pathlib.Path | None = None
    """Where checkpoints are written (None: the system's temporary folder)."""
    rounds: int = 3
    """Alternating rounds; medians are reported."""
    out: pathlib.Path | None = None
    """JSON file of the results."""


def synthetic(gigabytes: float) -> TrainState:
    """A state of that size, of random numbers, which no file system makes smaller."""
    rows = int(gigabytes * 1e9 / 4 / ARRAYS / 1024)
    kinds = [
        {f"{i:02d}": jax.random.normal(jax.random.key(k * ARRAYS + i), (rows, 1024)) for i in range(ARRAYS // KINDS)}
        for k in range(KINDS)
    ]  # fmt: skip
    zero = jnp.zeros((), jnp.int32)
    fields: dict[str, Any] = {field.name: zero for field in dataclasses.fields(TrainState)}
    return TrainState(**fields | {"params": kinds[0], "ema": (kinds[1],), "opt_state": (kinds[2], kinds[3])})


def timed(times: list[float], do: Callable[[], Any]) -> Any:
    """What `do` gives, with its seconds added to `times`."""
    start = time.perf_counter()
    result = do()
    times.append(time.perf_counter() - start)
    return result


def measure(options: Options, folder: pathlib.Path) -> dict[str, Any]:
    """Medians in seconds."""
    state = synthetic(options.gigabytes)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    hashed = checkpoint.file_checksums
    found: dict[str, list[float]] = {
        name: [] for name in ("start", "write_without_checksums", "write", "check", "restore")
    }
    step = 0
    with Checkpoints(folder, keep=1) as checkpoints:
        for _ in range(options.rounds + 1):
            for name, checksums in (("write_without_checksums", lambda *_: {}), ("write", hashed)):
                step += 1
                numbered = dataclasses.replace(state, step=jnp.int32(step))
                checkpoint.file_checksums = checksums
                begun = time.perf_counter()
                timed(
                    found["start"], lambda numbered=numbered: checkpoints.save(numbered, {"config": {}}, None)
                )
                checkpoints.wait()
                found[name].append(time.perf_counter() - begun)
                checkpoint.file_checksums = hashed
            damage = timed(found["check"], lambda step=step: find_damage(folder / str(step)))
            if damage:
                raise SystemExit(f"checkpoint.py: {damage}")
            got = timed(found["restore"], lambda: checkpoints.restore(like))
            np.testing.assert_array_equal(got.params["00"], state.params["00"])
    medians = {
        name: statistics.median(times[len(times) // (options.rounds + 1) :]) for name, times in found.items()
    }
    write = medians["write_without_checksums"]
    return {
        "benchmark": "checkpoint.py", "bytes": size, "hashing_threads": checkpoint.HASHERS, "seconds": medians,
        "write_ratio": medians["write"] / write, "check_ratio": medians["check"] / write,
    }  # fmt: skip


def main(options: Options) -> None:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        text = json.dumps(measure(options, pathlib.Path(folder)), indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
