"""The trainer: one loop, the same on a CPU, a GPU node and a pod."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import pathlib
import time
from typing import Any

import jax
import tqdm

from dit_jax import flops
from dit_jax.config import Config, ConfigError, from_json, to_json
from dit_jax.data.latents import open_dataset
from dit_jax.data.loader import batches
from dit_jax.data.metadata import LatentMetadata
from dit_jax.training.checkpoint import Checkpoints, check_meta, check_same_run, meta_of
from dit_jax.training.logging import MetricsLog
from dit_jax.training.program import build_program
from dit_jax.training.sharding import batch_sharding, make_mesh
from dit_jax.training.state import TrainState, zero_totals
from dit_jax.training.step import summarise

STEPS_IN_FLIGHT = 2  # how far the host may run ahead of the devices: batches wait in their memory


def train(config: Config) -> TrainState:
    """Train until step `config.train.steps`, from the newest checkpoint in the workdir if there is one.

    Returns the final state. Raises ConfigError, before anything is written, for options that contradict each
    other, the devices, the dataset or the run that the workdir holds.
    """
    t, workdir = config.train, pathlib.Path(config.train.workdir)
    check_workdir(config, workdir)
    mesh = make_mesh(config.mesh)
    dataset = open_dataset(config)
    metadata, fingerprint = dataset.metadata, dataset_fingerprint(dataset.metadata)
    program = build_program(
        config, mesh, scaling_factor=metadata.scaling_factor, shift_factor=metadata.shift_factor
    )

    with contextlib.ExitStack() as closing:
        checkpoints = Checkpoints(workdir / "checkpoints", t.keep, t.milestone_every)
        closing.callback(checkpoints.close)
        state = checkpoints.restore(program.state, check_meta(config, fingerprint, checkpoints.directory))
        if state is None:
            state = program.init()
        step = int(state.step)
        write_description(config, metadata, workdir)
        log = MetricsLog(workdir, step)
        closing.callback(log.close)
        data = batches(
            dataset, t.batch_size, t.seed, step + int(state.data_offset), batch_sharding(mesh),
            cache=config.data.cache, workers=config.data.workers,
        )  # fmt: skip
        closing.callback(data.close)
        bar = closing.enter_context(
            tqdm.tqdm(total=t.steps, initial=step, unit="step", disable=jax.process_index() != 0)
        )

        clock, loss = Throughput(config, mesh.size), float("inf")
        in_flight: collections.deque[Any] = collections.deque()
        while step < t.steps:
            state, metrics = program.step(state, next(data))
            step += 1
            in_flight.append(metrics)
            if len(in_flight) > STEPS_IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            bar.update()
            if not clock.started:  # compilation is over
                jax.block_until_ready(metrics)
                clock.lap(step)

            if step % t.log_every == 0 or step == t.steps:
                line = summarise(jax.device_get(state.totals))  # waits for this step
                if step % t.log_every == 0:  # a run that is extended later completes the window
                    state = state.replace(totals=reset_totals(state.totals))
                line |= clock.lap(step)
                loss = line["loss"]
                log.write(step, line)
                bar.set_postfix({"loss": f"{loss:.4f}", "img/s": f"{line['images_per_second']:.0f}"})
            if step % t.checkpoint_every == 0 or step == t.steps:
                with clock.paused():
                    checkpoints.save(state, meta_of(config, fingerprint), loss)
            if t.sample_every and (step % t.sample_every == 0 or step == t.steps):
                from dit_jax.generation import write_sample_grid

                with clock.paused():
                    path = workdir / "samples" / f"{step:07d}.png"
                    write_sample_grid(
                        path,
                        config=config,
                        model=program.model,
                        params=state.ema[0],
                        metadata=metadata,
                        mesh=mesh,
                    )
    return state


def reset_totals(totals: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Zeros, laid out as the totals were."""
    return {name: jax.device_put(zero, totals[name].sharding) for name, zero in zero_totals().items()}


class Throughput:
    """Images per second and the share of the devices' peak, over the time between lines of the log."""

    def __init__(self, config: Config, num_devices: int) -> None:
        self._batch_size = config.train.batch_size
        self._flops_per_image = flops.train_flops_per_image(config)
        peak = flops.peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * num_devices if peak else None
        self._since: float | None = None
        self._step = 0

    @property
    def started(self) -> bool:
        """Whether a lap is running."""
        return self._since is not None

    @contextlib.contextmanager
    def paused(self) -> Any:
        """Time spent inside does not count."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - start

    def lap(self, step: int) -> dict[str, float]:
        """Rates since the last call; {} at the first."""
        now, rates = time.perf_counter(), {}
        if self._since is not None:
            rate = (step - self._step) * self._batch_size / (now - self._since)
            rates["images_per_second"] = rate
            if self._peak:
                rates["mfu"] = rate * self._flops_per_image / self._peak
        self._since, self._step = now, step
        return rates


def dataset_fingerprint(metadata: Any) -> str:
    """SHA-256 of a dataset's metadata, which holds a checksum of every shard."""
    return hashlib.sha256(metadata.to_json().encode()).hexdigest()


def check_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Raises ConfigError if the workdir holds a run of another config."""
    path = workdir / "config.json"
    if path.is_file():
        check_same_run(config, from_json(path.read_text()), workdir)
    elif (workdir / "checkpoints").exists():
        raise ConfigError(
            f"--train.workdir {workdir} has checkpoints but no config.json; name another folder"
        )


def write_description(config: Config, metadata: LatentMetadata, workdir: pathlib.Path) -> None:
    """The resolved config as workdir/config.json and the dataset's metadata as dataset.json, by process 0.

    With them a workdir can be sampled from where the dataset is not.
    """
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, text in (("config.json", to_json(config)), ("dataset.json", metadata.to_json())):
            temporary = workdir / f".{name}.tmp"
            temporary.write_text(text)
            os.replace(temporary, workdir / name)
