"""The compiled side of a run, made from shapes alone: it needs no data, no real arrays, no hardware."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dit_jax.compiler import compiler_options
from dit_jax.conditions import condition_of
from dit_jax.config import Config, ConfigError
from dit_jax.diffusion.create import create_process
from dit_jax.diffusion.process import Process
from dit_jax.models.compute import TOKENS_LAST, cudnn_serves, resolve_attention, unrolls
from dit_jax.models.create import Model, build_model
from dit_jax.models.kernels.fused_norm import check_norm_kernel
from dit_jax.runs.state import TrainState
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.sharding import (
    asked,
    batch_sharding,
    check_batch,
    fsdp_axis,
    replicated,
    state_shardings,
)
from dit_jax.training.state import init_state, make_state
from dit_jax.training.step import Draw, draw_key, make_train_step


@dataclass(frozen=True)
class Program:
    """Model, process and jitted functions of a run on one mesh.

    Attributes:
      state: a TrainState of `jax.ShapeDtypeStruct` with shardings, the layout of the real one.
      init: () -> fresh TrainState, born sharded.
      start_from: params -> TrainState at step 0 with these parameters.
      step: (state, batch) -> (state, metrics); the state's buffers are donated. There is a program for each size of
        latents.
      microbatches: parts of a batch that a step accumulates over.
    """

    model: Model
    process: Process
    optimizer: optax.GradientTransformation
    mesh: Mesh
    state: TrainState
    init: Callable[[], TrainState]
    start_from: Callable[[Any], TrainState]
    step: Any
    microbatches: int


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the training state."""
    model, optimizer = build_model(config), make_optimizer(config)
    shapes = jax.eval_shape(functools.partial(init_state, model, optimizer, config), jax.random.key(0))
    shardings = state_shardings(shapes, mesh, config.mesh.preset)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


@dataclass(frozen=True)
class StepOfEachSize:
    """A step, and its program, for latents of each height and width; compiled when the first batch of it comes."""

    steps: dict[tuple[int, int], Any]

    def _of(self, batch: Any) -> Any:
        return self.steps[latent_size(batch)]

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """See `Program.step`."""
        return self._of(batch)(state, batch)

    def lower(self, state: Any, batch: Any) -> Any:
        """The program of arguments like these."""
        return self._of(batch).lower(state, batch)


def latent_size(batch: Any) -> tuple[int, int]:
    """Height and width of a batch's latents."""
    return batch["moments"].shape[2:4]


def abstract_batch(config: Config, mesh: Mesh, dtype: Any = np.float16) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of a global batch of stored moments and conditions, of the base size."""
    m, b = config.model, config.train.batch_size
    views = 2 if config.data.mirror else 1
    return {
        "moments": jax.ShapeDtypeStruct(
            (b, views, *m.input_size, 2 * m.in_channels), dtype, sharding=batch_sharding(mesh)
        ),
        **condition_of(config).shapes(b, batch_sharding(mesh)),
    }


def build_program(config: Config, mesh: Mesh, *, scaling_factor: float, shift_factor: float) -> Program:
    """The program of a resolved config; the two factors are the autoencoder's.

    Raises ConfigError when the batch, the heads or a parameter does not divide over the mesh, and when a kernel is
    not for the mesh's devices or leaves nothing to quantize.
    """
    m, c, device = config.model, config.compute, mesh.devices.flat[0]
    sizes = (m.input_size, *config.data.sizes)
    attention = resolve_attention(c.attention, c.dtype, m.num_tokens, m.head_dim, device)
    gpu = device.platform in ("gpu", "cuda")
    if attention == "cudnn" and not (gpu and cudnn_serves(c.dtype, m.head_dim)):
        raise ConfigError(
            f"--compute.attention is cudnn on a {device.platform} in {c.dtype} with {m.head_dim} channels a "
            "head; expected a GPU, bfloat16 and a multiple of 8 channels up to 128, or --compute.attention auto"
        )
    if c.quantization == "fp8" and attention in TOKENS_LAST:
        raise ConfigError(
            f"--compute.quantization is fp8 with attention {attention} (on a TPU what auto means), which has "
            "products of its own; expected none, or --compute.attention einsum, xla or cudnn"
        )
    check_norm_kernel(c.norm_kernel, m.conditioning, device.platform)
    microbatches = check_batch(config.train.batch_size, config.train.microbatch, mesh)
    heads = config.model.num_heads
    if heads and heads % mesh.shape["tensor"]:
        raise ConfigError(
            f"{asked(config.mesh)} means --mesh.tensor {mesh.shape['tensor']}; expected a divisor of "
            f"--model.num-heads {heads}"
        )
    model = build_model(config)
    model = model.computed(attention=attention, unroll=unrolls(c.unroll, model.hidden_size, mesh))
    optimizer = make_optimizer(config)
    process = create_process(config.diffusion)
    state = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def init() -> TrainState:
        return init_state(model, optimizer, config, draw_key(config.train.seed, 0, Draw.INIT))

    factors = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    step_of = functools.partial(
        _step_of, config, model, process, optimizer, state, mesh, microbatches, factors
    )
    return Program(
        model=model,
        process=process,
        optimizer=optimizer,
        mesh=mesh,
        state=state,
        init=jax.jit(init, out_shardings=shardings),
        start_from=jax.jit(
            lambda params: make_state(params, optimizer, config), in_shardings=(shardings.params,),
            out_shardings=shardings,
        ),
        step=StepOfEachSize({size: step_of(size) for size in sizes}) if sizes[1:] else step_of(m.input_size),
        microbatches=microbatches,
    )  # fmt: skip


def _step_of(
    config: Config, model: Model, process: Process, optimizer: optax.GradientTransformation, state: TrainState,
    mesh: Mesh, microbatches: int, factors: dict[str, float], size: tuple[int, int],
) -> Any:  # fmt: skip
    """The step on latents of this height and width, compiled when it is first called."""
    split, shardings = batch_sharding(mesh), jax.tree.map(lambda leaf: leaf.sharding, state)
    model, c = model.of_size(size), config.compute
    kernel = resolve_attention(
        c.attention, c.dtype, model.num_tokens, config.model.head_dim, mesh.devices.flat[0]
    )
    train_step = make_train_step(
        model.computed(
            attention=kernel, batch_sharding=split, fsdp_axis=fsdp_axis(mesh, config.mesh.preset)
        ), process, optimizer, config, **factors,
        microbatches=microbatches, mesh=mesh, grad_shardings=_gradient_shardings(state),
    )  # fmt: skip
    return jax.jit(
        train_step, donate_argnums=0, in_shardings=(shardings, split),
        out_shardings=(shardings, replicated(mesh)), compiler_options=compiler_options(mesh),
    )  # fmt: skip


def _gradient_shardings(state: TrainState) -> Any:
    """Gradients lie like the EMA: under zero1 each device then reduces only the part it updates."""
    return jax.tree.map(lambda leaf: leaf.sharding, state.ema[0])
