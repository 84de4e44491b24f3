"""One training step: a pure function of the state and a batch.

Everything random is drawn for the global batch from (seed, step, purpose) before any split, so losses do not
depend on the number of devices or hosts, nor on microbatches.

Letters: B global batch, A microbatches, h w c latent.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.conditions import AnyCondition
from dit_jax.config import Config
from dit_jax.data.latents import draw_latents
from dit_jax.diffusion.process import Process
from dit_jax.models.create import Model
from dit_jax.models.lora import frozen_but_lora, only_lora
from dit_jax.runs.state import TrainState, zero_totals
from dit_jax.training import ema
from dit_jax.training.optimizer import learning_rate
from dit_jax.training.sharding import BATCH_AXES

Batch = dict[str, jax.Array]
Inputs = dict[str, Any]
"""x0, t and noise, arrays, and the condition, a tree of them."""
Metrics = dict[str, jax.Array]


class Draw(enum.IntEnum):
    """What a random draw is for."""

    INIT = 0
    LATENT = 1
    TIME = 2
    NOISE = 3
    LABEL = 4


def draw_key(seed: int, step: int | jax.Array, purpose: Draw) -> jax.Array:
    """The key of one purpose at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def make_loss(model: Model, process: Process) -> Callable[..., tuple[jax.Array, Metrics]]:
    """The loss `(params, inputs) -> (mean over the batch, metrics)` of what a step draws."""

    def loss_fn(params: Any, inputs: Inputs) -> tuple[jax.Array, Metrics]:
        def network(x: jax.Array, t: jax.Array, condition: Any) -> Any:
            return model.apply({"params": frozen_but_lora(params)}, x, t, condition)

        t = inputs["t"]
        terms = process.losses(network, inputs["x0"], t, inputs["noise"], inputs["condition"])
        quarter = jax.nn.one_hot(quarter_of(process.noise_level(t)), 4)  # (B, 4)
        metrics = {
            name: terms[name].mean() if name in terms else jnp.zeros(()) for name in process.loss_names
        }
        metrics["loss_sum"] = terms["loss"] @ quarter
        metrics["loss_count"] = quarter.sum(axis=0)
        return metrics["loss"], metrics

    return loss_fn


def quarter_of(noise_level: jax.Array) -> jax.Array:
    """Which quarter of 0 to 1 each level (B,) lies in, (B,) int32 from 0 to 3."""
    return jnp.minimum((4 * noise_level).astype(jnp.int32), 3)


Gradients = Callable[[Any, Inputs], tuple[Any, Metrics]]
"""(params, inputs) -> (gradients of the mean loss, metrics)."""


def make_gradients(
    loss_fn: Callable[..., tuple[jax.Array, Metrics]],
    microbatches: int,
    split_batch: Callable[..., Any],
    grad_shardings: Any,
) -> Gradients:
    """The gradients of the mean loss, summed over microbatches.

    split_batch(tree, axis) splits that axis of a tree of arrays over the devices of the batch.
    """

    def gradients(params: Any, inputs: Inputs) -> tuple[Any, Metrics]:
        grad_fn = jax.grad(loss_fn, has_aux=True)
        if microbatches == 1:
            grads, metrics = grad_fn(params, inputs)
            return constrain(grads, grad_shardings), metrics
        # Every microbatch takes a part of each device's rows: no row moves to another device.
        parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), inputs)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            grads, metrics = grad_fn(params, split_batch(part))
            return jax.tree.map(jnp.add, total, (constrain(grads, grad_shardings), metrics)), None

        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_fn, params, first))
        (grads, metrics), _ = jax.lax.scan(add, zeros, split_batch(parts, axis=1))
        return mean_of_parts(grads, metrics, microbatches)

    return gradients


def add_over_devices_once(gradients: Gradients, mesh: Mesh, grad_shardings: Any) -> Gradients:
    """The same gradients, where `gradients` knows of one device alone: each runs it on its own rows of the batch.

    For gradients that every device keeps whole. The compiler would add them over the devices at every microbatch.
    """
    rows = PartitionSpec(BATCH_AXES)

    def of_own_rows(params: Any, inputs: Any) -> Any:
        return jax.tree.map(lambda x: x[None], gradients(params, inputs))

    of_each = jax.shard_map(
        of_own_rows, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
    )

    def of_all(params: Any, inputs: Inputs) -> tuple[Any, Metrics]:
        grads, metrics = jax.tree.map(lambda x: x.sum(axis=0), of_each(params, inputs))
        devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        return mean_of_parts(constrain(grads, grad_shardings), metrics, devices)

    return of_all


def whole_everywhere(shardings: Any) -> bool:
    """Whether every device keeps the whole of every array that lies so; None is left to the compiler, and is not."""
    return shardings is not None and all(s.is_fully_replicated for s in jax.tree.leaves(shardings))


def constrain(grads: Any, shardings: Any) -> Any:
    """The gradients, laid out as `shardings` (None: as they come) say."""
    return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)


def mean_of_parts(grads: Any, metrics: Metrics, parts: int) -> tuple[Any, Metrics]:
    """Gradients and metrics of a batch from their sums over that many parts of it."""
    sums = {name: metrics[name] for name in ("loss_sum", "loss_count")}
    means = jax.tree.map(lambda x: x / parts, (grads, metrics))
    return means[0], means[1] | sums


def update_if(good: jax.Array, update: Callable[..., Any], old: tuple[Any, ...]) -> Any:
    """update(*old) where `good` () holds, else old, in the way that copies no donated array.

    XLA's GPU compiler would copy the state into the result of a branch, its CPU compiler for a select after an
    update of several passes; its TPU compiler copies nothing, and expects a branch to be quicker.
    """

    def select(*old: Any) -> Any:  # a failed update is computed, and dropped
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), update(*old), old)

    def branch(*old: Any) -> Any:
        return jax.lax.cond(good, update, lambda *old: old, *old)

    return jax.lax.platform_dependent(*old, cpu=branch, tpu=branch, default=select)


def make_split(mesh: Mesh | None) -> Callable[..., Any]:
    """`(tree, axis=0) -> tree`, that axis of its arrays split over the mesh's batch axes; as it is with no mesh."""

    def split(tree: Any, axis: int = 0) -> Any:
        if mesh is None:
            return tree
        sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))
        return jax.lax.with_sharding_constraint(tree, sharding)

    return split


def make_draws(
    config: Config, kind: AnyCondition, process: Process, scaling_factor: float, shift_factor: float
) -> Callable[[Batch, jax.Array], Inputs]:
    """`(batch, step) -> the network's inputs for the global batch`: clean latents, time, noise, condition."""
    seed = config.train.seed

    def draw(batch: Batch, step: jax.Array) -> Inputs:
        key = {purpose: draw_key(seed, step, purpose) for purpose in Draw}
        x0 = draw_latents(batch, key[Draw.LATENT], scaling_factor, shift_factor, config.data.mirror)
        t = process.training_times(key[Draw.TIME], x0.shape[0])
        noise = jax.random.normal(key[Draw.NOISE], x0.shape, x0.dtype)
        condition = kind.drop(key[Draw.LABEL], kind.of(batch))
        return {"x0": x0, "t": t, "noise": noise, "condition": condition}

    return draw


def gradients_on(
    mesh: Mesh | None, model: Model, process: Process, microbatches: int, grad_shardings: Any
) -> Callable[..., tuple[Any, Metrics]]:
    """`make_gradients` of the network's loss, added over the devices of the mesh as seldom as their memory allows."""
    if microbatches > 1 and mesh is not None and mesh.size > 1 and whole_everywhere(grad_shardings):
        # Not under the other presets: a device then has no room for all gradients, or not for all parameters.
        alone = make_loss(model.computed(batch_sharding=None), process)
        of_a_device = make_gradients(alone, microbatches, make_split(None), None)
        return add_over_devices_once(of_a_device, mesh, grad_shardings)
    return make_gradients(make_loss(model, process), microbatches, make_split(mesh), grad_shardings)


def make_train_step(
    model: Model,
    process: Process,
    optimizer: optax.GradientTransformation,
    config: Config,
    *,
    scaling_factor: float,
    shift_factor: float,
    microbatches: int = 1,
    mesh: Mesh | None = None,
    grad_shardings: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step `(state, {"moments": (B, M, h, w, 2c), condition}) -> (state, metrics of this step)`.

    scaling_factor and shift_factor are the autoencoder's. With a mesh, draws and microbatches are split over
    its batch axes; with grad_shardings (one per parameter), gradients are reduced onto them.
    An update that is not finite is left out; it counts in `skipped` and not in the other metrics.
    """
    schedule = learning_rate(config)

    split_batch = make_split(mesh)
    draw = make_draws(config, model.condition, process, scaling_factor, shift_factor)
    gradients = gradients_on(mesh, model, process, microbatches, grad_shardings)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        updates_done = state.step - state.skipped
        grads, metrics = gradients(state.params, split_batch(draw(batch, state.step + state.data_offset)))
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)

        def update(params: Any, opt_state: Any, averages: Any) -> tuple[Any, Any, Any]:
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = only_lora(optax.apply_updates(params, updates), params)
            rates = ema.rates(config.optim, updates_done)
            averages = tuple(ema.update(a, params, rate) for a, rate in zip(averages, rates, strict=True))
            return params, opt_state, averages

        new = update_if(finite, update, (state.params, state.opt_state, state.ema))
        metrics |= {
            "steps": jnp.ones(()),
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(updates_done), jnp.float32),
        }
        metrics = {name: jnp.where(finite, value, 0) for name, value in metrics.items()}
        bad = 1 - finite.astype(jnp.int32)
        metrics["skipped"] = bad.astype(jnp.float32)
        state = TrainState(
            step=state.step + 1,
            params=new[0],
            opt_state=new[1],
            ema=new[2],
            skipped=state.skipped + bad,
            bad_streak=(state.bad_streak + 1) * bad,
            data_offset=state.data_offset,
            totals={name: total + metrics[name] for name, total in state.totals.items()},
        )
        return state, metrics

    return train_step


def summarise(totals: dict[str, Any]) -> dict[str, float]:
    """Means over the summed steps, ready for the log; `totals` on the host.

    Updates that were left out do not count: where all were, there are no means, only `skipped`.
    """
    line = {"skipped": float(totals["skipped"])}
    steps = float(totals["steps"])
    if steps == 0:
        return line
    terms = sorted(totals.keys() - zero_totals(()).keys(), key=lambda name: (name != "loss", name))
    line |= {name: float(totals[name]) / steps for name in (*terms, "grad_norm", "learning_rate")}
    for i in range(4):
        count = float(totals["loss_count"][i])
        if count > 0:
            line[f"loss_t{i + 1}of4"] = float(totals["loss_sum"][i]) / count
    return line
