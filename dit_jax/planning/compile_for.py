"""Compile a run for TPUs that are not here, and read from the program whether it fits and how fast it can be.

    python train.py  --config configs/dit_xl2_imagenet256.py --compile-for v5e:16x16
    python sample.py --config configs/dit_xl2_imagenet256.py --compile-for v5e:16x16

The TPU compiler (libtpu) runs on any Linux host. What it gives is the program that the chips would run: its
memory is exact, its time an estimate. The time is the sum of the compiler's cycle estimates, which leave out
collectives; those take their bytes over one axis of the torus, and count as far as no computation hides them.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import Config, ConfigError
from dit_jax.devices import peak_flops
from dit_jax.diffusion.create import create_process
from dit_jax.models import cost
from dit_jax.models.compute import resolve_attention
from dit_jax.models.create import init_params
from dit_jax.planning import hlo, timeline
from dit_jax.samplers.table import plan
from dit_jax.training.launch import EXIT_DOES_NOT_FIT
from dit_jax.training.program import abstract_batch, build_program
from dit_jax.training.sharding import bytes_per_device, make_mesh

EXAMPLES = "v4:4x4x4, v5e:16x16, v5p:4x4x4 or v6e:16x16"

# What the compiler says when memory runs out: all of it, or already what lies between two operations.
_OUT_OF_MEMORY = (
    r"Used (\S+) of (\S+) hbm\. Exceeded",
    r"total memory required for .* \((\S+)\) exceeds available HBM \((\S+)\)",
)


@dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Attributes: `hbm_gib` memory of a chip and `flops_per_cycle` of its matrix units in bfloat16 (Google Cloud's
    TPU pages; v6e's from the compiler's own estimate of a large product); the clock follows from the datasheet's
    peak. `ici` is what a chip sends along one axis of the torus, both directions, in bytes/s ("How to Scale
    Your Model", chapter on TPUs).
    """

    name: str
    hbm_gib: float
    flops_per_cycle: int
    ici: float
    peak_flops: float = 0.0

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.peak_flops / self.flops_per_cycle


CHIPS = (
    Chip("v4", 32, 2 * 4 * 2 * 128 * 128, 9e10, peak_flops("TPU v4") or 0),
    Chip("v5e", 16, 4 * 2 * 128 * 128, 9e10, peak_flops("TPU v5 lite") or 0),
    Chip("v5p", 95, 2 * 4 * 2 * 128 * 128, 1.8e11, peak_flops("TPU v5") or 0),
    Chip("v6e", 32, 4 * 2 * 256 * 256, 1.8e11, peak_flops("TPU v6 lite") or 0),
)


class DoesNotFitError(RuntimeError):
    """The program needs more memory than a chip has."""


@dataclass(frozen=True)
class Report:
    """What a compiled program needs and costs, per chip; sizes in bytes, times in seconds.

    Attributes:
      arguments: bytes by part of what the program is given.
      memory: the compiler's account: arguments with the padding of their layout, outputs that share no
        argument's buffer, temporaries (activations, gradients, gathered parameters), code.
      images: that a chip computes, alone or, where the mesh has a tensor axis, with the others along it.
      flops: analytic, of one chip's part of the batch (forward, and backward when training).
      cycles, seconds: the compiler's estimate without collectives; `exposed_seconds` of collectives come on top.
      unknown_loops: loops that nobody knows how often run; they count once, and times are lower bounds then.
    """

    what: str
    topology: str
    chip: Chip
    mesh: dict[str, int]
    images: int
    arguments: dict[str, int]
    memory: dict[str, int]
    collectives: list[timeline.Collective]
    flops: float
    cycles: int
    operations: list[hlo.Operation]
    compile_seconds: float
    unknown_loops: list[str]

    @property
    def total_bytes(self) -> int:
        """Memory that one chip needs."""
        return sum(self.memory.values())

    @property
    def images_per_chip(self) -> float:
        """A chip's share of the batch; no whole number where several chips share an image."""
        return self.images / self.mesh.get("tensor", 1)

    @property
    def seconds(self) -> float:
        """Estimated time of computation."""
        return self.cycles / self.chip.clock

    @property
    def exposed_seconds(self) -> float:
        """Time that a chip waits for collectives."""
        return sum(c.exposed_bytes for c in self.collectives) / self.chip.ici

    @property
    def mfu(self) -> float:
        """Share of the chip's peak, if all collectives were hidden."""
        return self.flops / (self.seconds * self.chip.peak_flops)

    @property
    def mfu_with_collectives(self) -> float:
        """Share of the chip's peak with the exposed collectives on top."""
        return self.flops / ((self.seconds + self.exposed_seconds) * self.chip.peak_flops)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, the derived figures, the ten costliest operations."""
        found = asdict(replace(self, operations=self.operations[:10]))
        derived = (
            "total_bytes",
            "images_per_chip",
            "seconds",
            "exposed_seconds",
            "mfu",
            "mfu_with_collectives",
        )
        return found | {name: getattr(self, name) for name in derived}


def topology_devices(topology: str) -> tuple[Chip, Sequence[Any]]:
    """The chip and the devices of a topology such as "v5e:16x16", without any TPU; needs libtpu.

    One device is one chip: on v4 the two cores of a chip work as one, as they do by default on Google Cloud.
    Raises ConfigError for an unknown name or without libtpu.
    """
    chip = next((c for c in CHIPS if c.name == topology.partition(":")[0]), None)
    if chip is None:
        raise ConfigError(f"--compile-for is {topology!r}; expected a TPU topology such as {EXAMPLES}")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--compile-for needs the TPU compiler: pip install libtpu (Linux, x86-64)"
        ) from None
    # The compiler must not look for a TPU, its metadata server, or for other processes that hold one.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        return chip, topologies.get_topology_desc(topology, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise ConfigError(
            f"--compile-for is {topology!r}, which the compiler does not know ({reason}); expected a TPU "
            f"topology such as {EXAMPLES}"
        ) from None


def compile_training(config: Config, topology: str) -> Report:
    """The training step of a resolved config, compiled for the chips of `topology`.

    Raises DoesNotFitError, with advice, when a chip has too little memory, and ConfigError as training would.
    """
    chip, devices = topology_devices(topology)
    config = _for_tpu(config, devices[0])
    mesh = make_mesh(config.mesh, devices)
    program = build_program(config, mesh, scaling_factor=1.0, shift_factor=0.0)
    batch = abstract_batch(config, mesh)
    images = config.train.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    parts = {
        "parameters": program.state.params,
        "optimizer": program.state.opt_state,
        "EMA": program.state.ema,
        "batch": batch,
    }
    return _report(
        program.step.lower(program.state, batch),
        chip,
        training_advice(config, images // program.microbatches),
        what=f"training step of {config.model.name}, {config.mesh.preset}, remat {config.compute.remat}",
        topology=topology,
        mesh=dict(mesh.shape),
        images=images,
        arguments={name: _device_bytes(tree) for name, tree in parts.items()},
        flops=cost.train_flops_per_image(config) * config.train.batch_size / mesh.size,
    )


def compile_sampling(config: Config, options: Any, batch_size: int, topology: str) -> Report:
    """The whole sampling loop, compiled for the chips of `topology` with float32 weights on each of them.

    options: a `dit_jax.generation.sampling.SamplingOptions`. The batch is filled up to a multiple of the chips.
    """
    from dit_jax.generation.sampling import batch_axes, make_latent_sampler
    from dit_jax.models.create import build_model

    chip, devices = topology_devices(topology)
    config = _for_tpu(config, devices[0])
    mesh = Mesh(np.array(devices), ("data",))
    batch_size += -batch_size % mesh.size
    model = build_model(config)
    split, whole = NamedSharding(mesh, batch_axes(mesh)), NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda key: init_params(model, config, key), jax.random.key(0))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
    numbers = jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=split)
    sampler: Any = make_latent_sampler(model, config, options, mesh)
    process = create_process(config.diffusion)
    choice = options.choice(process)
    passes = (plan(process, choice).evaluations or options.steps) * (2 if options.cfg_scale != 1.0 else 1)
    return _report(
        sampler.lower(params, 0, numbers, model.condition.shapes(batch_size, split)),
        chip,
        "give a smaller --batch-size, or more chips",
        what=f"{choice.steps} {choice.sampler} steps of {config.model.name}, guidance {options.cfg_scale}",
        topology=topology,
        mesh=dict(mesh.shape),
        images=batch_size // mesh.size,
        arguments={"parameters": _device_bytes(params)},
        flops=2.0 * cost.forward_macs(config) * passes * batch_size / mesh.size,
    )


def _for_tpu(config: Config, device: Any) -> Config:
    """The config with what "auto" means on this TPU; ConfigError where it asks for a GPU's kernel."""
    if config.compute.norm_kernel == "pallas":
        raise ConfigError(
            "--compute.norm-kernel is pallas, a kernel for GPUs; expected xla with --compile-for"
        )
    m, c = config.model, config.compute
    if c.attention == "cudnn":
        raise ConfigError("--compute.attention is cudnn, a kernel for GPUs; expected auto with --compile-for")
    attention: Any = resolve_attention(c.attention, c.dtype, m.num_tokens, m.head_dim, device)
    return replace(config, compute=replace(c, attention=attention))


def training_advice(config: Config, images: int) -> str:
    """What to change when a step with `images` images on a chip at once does not fit."""
    advice = []
    if config.compute.remat != "full":
        advice.append("--compute.remat full" if config.compute.remat == "dots_attention" else
                      "--compute.remat dots_attention or full")  # fmt: skip
    if config.mesh.preset in ("replicated", "zero1"):
        advice.append("--mesh.preset fsdp")
    if images > 1:
        advice.append(f"--train.microbatch {images // 2}")
    if config.compute.dtype != "bfloat16":
        advice.append("--compute.dtype bfloat16")
    return "try " + ", ".join(advice or ["more chips"])


def _report(lowered: Any, chip: Chip, advice: str, **known: Any) -> Report:
    """The report on a lowered program; DoesNotFitError, with the advice, where a chip has too little memory."""
    start = time.perf_counter()
    try:
        with no_compilation_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        need = next((found for p in _OUT_OF_MEMORY if (found := re.search(p, str(error)))), None)
        if need is None:
            raise
        raise DoesNotFitError(
            f"does not fit: the program needs {need[1]} of the {need[2]} of memory that a {chip.name} chip has "
            f"for it; {advice}"
        ) from None
    seconds = time.perf_counter() - start
    stats, module = compiled.memory_analysis(), hlo.parse(_program_text(compiled))
    operations = hlo.operations(module, chip.flops_per_cycle)
    report = Report(
        chip=chip,
        memory={
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
        },
        collectives=timeline.collectives(module, chip.flops_per_cycle, chip.clock / chip.ici),
        unknown_loops=hlo.unknown_loops(module),
        cycles=sum(o.cycles for o in operations),
        operations=operations,
        compile_seconds=seconds,
        **known,
    )
    if report.total_bytes > chip.hbm_gib * 2**30:
        raise DoesNotFitError(
            f"does not fit: the program needs {report.total_bytes / 2**30:.2f} GiB and a {chip.name} chip has "
            f"{chip.hbm_gib:g} GiB; {advice}"
        )
    return report


def _program_text(compiled: Any) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # seen for unrolled layers on v6e
        raise ConfigError(
            "--compile-for: the step compiles and fits, but this libtpu's program cannot be written out to be read "
            f"({str(error).splitlines()[0]}); other options, such as no --compute.unroll, may help"
        ) from None


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Neither reads nor writes jax's persistent cache: without the chips a program cannot be read back."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # jax asks once whether there is a cache
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _device_bytes(tree: Any) -> int:
    return bytes_per_device(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))


# -------------------------------------------------------------------------------------------- as text


def print_report(script: str, compile_program: Callable[[], Report]) -> int:
    """Print the report, or why the program does not fit; the exit code of `script`."""
    try:
        print(describe(compile_program()))
    except DoesNotFitError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return EXIT_DOES_NOT_FIT
    return 0


def describe(report: Report, top: int = 12) -> str:
    """The report as lines of text."""
    chip, gib = report.chip, 2**30
    chips, tensor = int(np.prod(list(report.mesh.values()))), report.mesh.get("tensor", 1)
    lines = [
        f"program         {report.what}",
        f"chips           {chips} x {chip.name} ({report.topology}), mesh "
        + ", ".join(f"{axis} {size}" for axis, size in report.mesh.items()),
        f"batch           {report.images_per_chip:g} images per chip"
        + (f": {tensor} chips share {report.images}" if tensor > 1 else ""),
        f"compile time    {report.compile_seconds:.0f} s",
        f"memory          {report.total_bytes / gib:.2f} GiB of {chip.hbm_gib:g} GiB per chip: "
        + ", ".join(f"{name} {size / gib:.2f}" for name, size in report.memory.items()),
        *(f"                {size / gib:8.3f} GiB {name}" for name, size in report.arguments.items()),
        "collectives     count (with computation meanwhile), whole arrays, sent by a chip over a ring, waited for",
        *(
            f"                {c.kind:<19}{c.count:>5} ({c.asynchronous}) {c.bytes / 1e6:>10.1f} MB"
            f"{c.wire_bytes / 1e6:>10.1f} MB{c.exposed_bytes / 1e6:>10.1f} MB"
            for c in report.collectives
        ),
        f"FLOPs           {report.flops / 1e12:.2f} T per chip, at {chip.peak_flops / 1e12:.0f} TFLOP/s peak",
        f"estimate        {report.cycles / 1e6:.1f} M cycles at {chip.clock / 1e9:.2f} GHz = "
        f"{report.seconds * 1e3:.1f} ms: {report.mfu:.1%} of the peak, "
        f"{report.images_per_chip / report.seconds:.1f} images/s per chip, with all collectives hidden",
        f"                {report.exposed_seconds * 1e3:.1f} ms of waiting for collectives (one axis of the "
        f"torus, {chip.ici / 1e9:.0f} GB/s) on top: {report.mfu_with_collectives:.1%}",
        *(
            [f"lower bound     of all times: loops that run an unknown number of times count once: {loops}"]
            if (loops := ", ".join(report.unknown_loops))
            else []
        ),
        f"operations      the {top} costliest of {len(report.operations)}",
    ]
    for op in report.operations[:top]:
        source = "/".join(op.source.split("/")[-3:]) or op.opcode
        share, shape = op.cycles / report.cycles, op.shape.partition("{")[0]
        lines.append(f"{share:>22.1%}  {op.times:>4} x {op.name:<34.34} {shape:<28.28} {source:.60}")
    return "\n".join(lines)
