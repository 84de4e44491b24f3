"""How many latents a second reach the devices, and does a training step ever wait for them?

    python benchmarks/loader.py --out loader.json

Writes a synthetic dataset (4x32x32 float16 moments with mirrors, 32 KB a record) with this package's own writer, and
for the comparison one .npy file of moments and one of the label per sample, as published DiT trainers store them,
read by PyTorch's DataLoader. Both are read shuffled, from a disk whose cache is warm, in alternating rounds. Then two
training runs measure which share of the time the loop waits for its next batch.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Generator

import jax
import numpy as np
import tqdm
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from dit_jax.config import Config, DataConfig, ModelConfig, TrainConfig, load, resolve
from dit_jax.data.encode import prepare
from dit_jax.data.encoders import Encoder
from dit_jax.data.latents import LatentDataset, open_dataset
from dit_jax.data.loader import Cache, batches
from dit_jax.data.sources import ArraySource
from dit_jax.training.program import build_program
from dit_jax.training.sharding import batch_sharding, make_mesh

SHAPE = (2, 32, 32, 8)  # M, h, w, 2c
CLASSES = 1000
STEPS_IN_FLIGHT = 2  # as the trainer


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure the loader."""

    out: pathlib.Path | None = None
    """JSON file of the results."""
    dir: pathlib.Path | None = None
    """Where the data lie or will lie (None: a temporary folder)."""
    records: int = 100_000
    """Records of the synthetic set."""
    files: int = 20_000
    """Samples of the set of .npy files."""
    batch_size: int = 256
    """Records in a batch."""
    rounds: int = 5
    """Alternating rounds; medians are reported."""
    seconds: float = 3.0
    """Length of a round's measurement."""
    workers: int = 0
    """Threads of ours (0: its own choice)."""
    peer_workers: int = os.cpu_count() or 2
    """Worker processes of PyTorch's DataLoader."""
    steps: int = 20
    """Training steps of the synthetic run."""


class Blank(ArraySource):
    """Records without pictures: the encoder below does not look at them."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (256, 256)), index % CLASSES


def random_moments(count: int) -> np.ndarray:
    """Moments (count, M, h, w, 2c) float16."""
    return np.abs(np.random.default_rng(0).standard_normal((count, *SHAPE), np.float32)).astype(np.float16)


def write_ours(folder: pathlib.Path, records: int) -> LatentDataset:
    """The synthetic set, through the package's writer."""
    block = random_moments(256)
    encoder = Encoder(
        vae="synthetic", vae_hash="0" * 64, backend="flax", precision="float32", scaling_factor=0.18215,
        shift_factor=0.0, factor=8, channels=4, devices=1,
        compile=lambda mirrors, dtype: lambda images: block[: len(images)],
    )  # fmt: skip
    names = tuple(map(str, range(CLASSES)))
    source = Blank("synthetic", np.zeros((records, 1, 1), np.uint8), np.arange(records) % CLASSES, names)
    prepare(source, encoder, folder, image_size=256, batch_size=256)
    return LatentDataset(folder)


def write_files(folder: pathlib.Path, count: int) -> None:
    """One .npy of moments and one of the label per sample."""
    if (folder / f"{count - 1}.label.npy").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    block = random_moments(256)
    for i in tqdm.trange(count, desc="writing .npy files"):
        np.save(folder / f"{i}.npy", block[i % 256])
        np.save(folder / f"{i}.label.npy", np.int64(i % CLASSES))


def our_batches(dataset: LatentDataset, options: Options, seed: int, cache: Cache) -> Generator[object]:
    """Batches on the device."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    stream = batches(dataset, options.batch_size, seed, 0, sharding, cache, options.workers)
    with contextlib.closing(stream):
        for batch in stream:
            yield jax.block_until_ready(batch)


class Files:
    """The .npy files as PyTorch's map-style dataset; at the top level, so that workers can be spawned."""

    def __init__(self, folder: pathlib.Path, count: int):
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.load(self.folder / f"{index}.npy"), np.load(self.folder / f"{index}.label.npy")


def peer_batches(folder: pathlib.Path, options: Options, seed: int) -> Generator[object]:
    """PyTorch's DataLoader over the files, batches in host memory."""
    import torch
    import torch.utils.data

    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        Files(folder, options.files),  # type: ignore[arg-type]
        options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.peer_workers,
        persistent_workers=True,
        multiprocessing_context="spawn",
        generator=torch.Generator().manual_seed(seed),
    )
    while True:
        yield from loader


def rate(stream: Generator[object], options: Options) -> float:
    """Records a second, after as many batches as wait in buffers."""
    with contextlib.closing(stream):
        for _ in itertools.islice(stream, 24):
            pass
        start, count = time.perf_counter(), 0
        while time.perf_counter() < start + options.seconds:
            next(stream)
            count += options.batch_size
        return count / (time.perf_counter() - start)


def wait_share(config: Config, dataset: LatentDataset, steps: int) -> dict[str, float]:
    """Shares of the time in which the training loop waits for a batch, and in which the devices do.

    The devices still have steps to do while the loop waits; where they have none left when the batch arrives, the
    whole of that wait is counted as theirs: an upper bound.
    """
    mesh = make_mesh(config.mesh)
    m = dataset.metadata
    program = build_program(config, mesh, scaling_factor=m.scaling_factor, shift_factor=m.shift_factor)
    state, in_flight, waited, idle = program.init(), [], 0.0, 0.0
    data = batches(
        dataset, config.train.batch_size, 0, 0, batch_sharding(mesh), config.data.cache, config.data.workers
    )
    with contextlib.closing(data):
        start = 0.0
        for step in tqdm.trange(steps + 3, desc="training"):
            if step == 3:  # compilation is over
                jax.block_until_ready(state)
                start, waited, idle = time.perf_counter(), 0.0, 0.0
            before = time.perf_counter()
            batch = next(data)
            wait = time.perf_counter() - before
            waited += wait
            if in_flight and all(array.is_ready() for array in jax.tree.leaves(in_flight[-1])):
                idle += wait
            state, metrics = program.step(state, batch)
            in_flight.append(metrics)
            if len(in_flight) > STEPS_IN_FLIGHT:
                jax.block_until_ready(in_flight.pop(0))
        jax.block_until_ready(state)
        total = time.perf_counter() - start
    return {
        "step_ms": 1e3 * total / steps,
        "wait_ms": 1e3 * waited / steps,
        "loop_wait_share": waited / total,
        "device_wait_share": idle / total,
    }


def main(options: Options) -> None:
    """Measure, print and write the results."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.dir or pathlib.Path(temporary)
        dataset = write_ours(folder / "latents", options.records)
        write_files(folder / "files", options.files)
        rates: dict[str, list[float]] = {"streamed": [], "ram": [], "peer": []}
        cpu = []
        for seed in range(options.rounds):
            before, spent = time.perf_counter(), time.process_time()
            rates["streamed"].append(rate(our_batches(dataset, options, seed, "none"), options))
            cores = (time.process_time() - spent) / (time.perf_counter() - before)
            cpu.append(1e6 * cores / rates["streamed"][-1])
            rates["ram"].append(rate(our_batches(dataset, options, seed, "ram"), options))
            rates["peer"].append(rate(peer_batches(folder / "files", options, seed), options))
            print(f"round {seed}: " + ", ".join(f"{name} {found[-1]:,.0f}" for name, found in rates.items()))
        ratios = {
            name: statistics.median(a / b for a, b in zip(rates[name], rates["peer"], strict=True))
            for name in ("streamed", "ram")
        }
        digits = resolve(load("configs/digits.py"))
        digits = dataclasses.replace(
            digits, data=dataclasses.replace(digits.data, dir=str(folder / "digits"))
        )
        synthetic = resolve(
            Config(
                model=ModelConfig(name="DiT-S/8"),
                data=DataConfig(dir=str(folder / "latents")),
                train=TrainConfig(batch_size=64),
            )
        )
        result = {
            "cores": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
            "record_bytes": dataset.record_bytes,
            "records_per_second": {name: statistics.median(found) for name, found in rates.items()},
            "cpu_us_per_record": statistics.median(cpu),
            "load_average": os.getloadavg()[0],
            "ratio_to_peer": ratios,
            "digits": wait_share(digits, open_dataset(digits), 5 * options.steps),
            "synthetic": wait_share(synthetic, dataset, options.steps),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
