"""The training step: what it draws, what it updates, and that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.conditions import condition_of, drop_labels
from dit_jax.diffusion.create import create_process
from dit_jax.planning import hlo
from dit_jax.runs.state import zero_totals
from dit_jax.training import ema
from dit_jax.training.optimizer import learning_rate, make_optimizer
from dit_jax.training.program import abstract_batch, build_program
from dit_jax.training.sharding import batch_sharding, make_mesh
from dit_jax.training.step import Draw, draw_key, make_draws, summarise


@pytest.fixture(scope="module")
def five_steps(tiny):
    """(first state, state after each of five steps, metrics) on one device, adaLN-Zero."""
    config = tiny.config()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = build_program(config, mesh, scaling_factor=0.5, shift_factor=0.1)
    states, history = [jax.device_get(program.init())], []
    state = program.init()
    for step in range(5):
        state, metrics = program.step(state, jax.device_put(tiny.batch(step), batch_sharding(mesh)))
        states.append(jax.device_get(state))
        history.append(jax.device_get(metrics))
    return program, states, history


def test_ema_is_the_direct_sum(five_steps):
    _, states, _ = five_steps
    expected = jax.tree.map(np.float64, states[0].params)
    for n, state in enumerate(states[1:]):
        decay = min(0.9999, (1 + n) / (10 + n))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * np.float64(p), expected, state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), states[-1].ema[0], expected
    )


def test_ema_decay_reaches_its_limit(tiny):
    config = dataclasses.replace(tiny.config().optim, ema_decay=0.99)
    (decay,) = ema.decays(config, jnp.asarray(10**6))
    assert decay == jnp.float32(0.99)


def test_totals_sum_the_metrics_and_the_state_is_donated(five_steps, tiny):
    program, states, history = five_steps
    for name, total in states[-1].totals.items():
        np.testing.assert_allclose(total, sum(m[name] for m in history), rtol=1e-6)
    line = summarise(states[-1].totals)
    assert line["loss"] == pytest.approx(np.mean([m["loss"] for m in history]), rel=1e-6)
    assert line["loss"] == pytest.approx(line["mse"] + line["vb"], rel=1e-5)
    assert line["learning_rate"] == pytest.approx(1e-3)
    buckets = states[-1].totals["loss_count"]
    assert buckets.sum() == 5 * 16
    state = program.init()
    program.step(state, jax.device_put(tiny.batch(0), batch_sharding(program.mesh)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_wide_layers_unroll_by_themselves_on_one_cpu_device(tiny, monkeypatch):
    def loops(unroll, width, devices=1):
        monkeypatch.setattr("dit_jax.models.compute.UNROLLED_WIDTH", width)
        config = tiny.config(compute={"unroll": unroll})
        mesh = make_mesh(config.mesh, jax.devices()[:devices])
        program = build_program(config, mesh, scaling_factor=0.5, shift_factor=0.1)
        text = program.step.lower(program.state, abstract_batch(config, mesh)).as_text()
        return program.model.compute.unroll, text.count("stablehlo.while")

    rolled = loops(False, 32)
    assert loops("auto", 32) == loops(True, 33) == (True, rolled[1] - 2)  # forward and backward
    assert loops("auto", 33) == loops("auto", 32, devices=2) == rolled


@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # they leave an update out in different ways
def test_a_bad_batch_changes_nothing_but_the_counts(five_steps, tiny, platform, monkeypatch):
    program, states, history = five_steps
    if platform == "gpu":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *old, default, **_: default(*old))
        final, metrics, program = tiny.run(tiny.config(), 1, 5)
        assert tiny.relative_difference(final.params, states[-1].params) < 1e-5
        np.testing.assert_allclose(metrics[-1]["loss"], history[-1]["loss"], rtol=1e-5)
    sharding = batch_sharding(program.mesh)
    before = jax.device_get(program.init())
    batch = tiny.batch(0)
    batch["moments"][3, :, 0, 0, 0] = np.nan
    state, metrics = program.step(program.init(), jax.device_put(batch, sharding))
    assert (state.step, state.skipped, state.bad_streak) == (1, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)
    jax.tree.map(np.testing.assert_array_equal, state.ema, before.ema)
    assert metrics["skipped"] == 1
    assert metrics["loss"] == 0
    state, metrics = program.step(state, jax.device_put(tiny.batch(1), sharding))
    assert (state.step, state.skipped, state.bad_streak) == (2, 1, 0)
    assert np.isfinite(state.totals["loss"])
    assert state.totals["steps"] == 1


MESHES = {
    "replicated": {},
    "zero1": {"preset": "zero1"},
    "fsdp": {"preset": "fsdp", "data": 1, "fsdp": 2},
    "fsdp_tensor": {"preset": "fsdp_tensor", "data": 2, "fsdp": 1, "tensor": 2},
}


@pytest.mark.parametrize(
    "preset", [pytest.param(p, marks=() if p == "replicated" else pytest.mark.slow) for p in MESHES]
)
def test_microbatches_equal_the_big_batch(tiny, preset):
    start, _, _ = tiny.reference("adaln_zero")
    config, devices = (
        tiny.config(mesh=MESHES[preset], train={"microbatch": 2}),
        4 if "tensor" in preset else 2,
    )
    whole, whole_metrics, _ = tiny.run(tiny.config(), 2, 1, start)
    split, split_metrics, program = tiny.run(config, devices, 1, start)
    assert program.microbatches == 4
    for name in ("loss", "mse", "vb", "grad_norm", "loss_sum"):
        np.testing.assert_allclose(split_metrics[0][name], whole_metrics[0][name], rtol=1e-6)
    np.testing.assert_array_equal(split_metrics[0]["loss_count"], whole_metrics[0]["loss_count"])

    assert tiny.relative_difference(first_moments(split), first_moments(whole)) < 1e-6


def first_moments(state):
    """0.1 x the clipped gradient."""
    return jax.tree.leaves(state.opt_state[1][0].mu)


@pytest.mark.slow
def test_one_row_on_a_device_has_the_gradient_of_all(tiny):
    """Where inner axes are split as well, XLA's partitioner gave that of adaLN wrong, by most of its size."""
    start = jax.device_get(tiny.run(tiny.config(), 1, 3)[0])  # with gates that are not zero
    mesh = {"preset": "fsdp_tensor", "data": 2, "fsdp": 2, "tensor": 2}
    whole, _, _ = tiny.run(tiny.config(), 1, 1, start)
    split, _, program = tiny.run(tiny.config(mesh=mesh, train={"microbatch": 1}), 8, 1, start)
    assert program.microbatches == 4
    assert tiny.relative_difference(first_moments(split), first_moments(whole)) < 1e-5


@pytest.mark.slow
def test_microbatches_are_added_over_devices_once(tiny):
    """Under `replicated` no loop of the compiled program has a collective: neither over microbatches nor layers."""
    config = tiny.config(train={"microbatch": 1})
    program = build_program(config, make_mesh(config.mesh), scaling_factor=1.0, shift_factor=0.0)
    assert program.microbatches == 2
    compiled = program.step.lower(program.state, abstract_batch(config, program.mesh)).compile()
    module = hlo.parse(compiled.as_text())
    sent = {"once": 0, "in loops": 0}
    for name, times in hlo.executions(module).items():
        reduced = [
            hlo.shape_bytes(o.shape) for o in module.computations[name] if o.opcode.startswith("all-reduce")
        ]
        sent["once" if times == 1 else "in loops"] += times * sum(reduced)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.state.params))
    assert sent["in loops"] == 0
    assert size <= sent["once"] < 1.1 * size


def test_labels_drop_at_their_rate():
    labels = jnp.arange(200_000) % 10
    dropped = drop_labels(jax.random.key(0), labels, 10, 0.1)
    null = np.asarray(dropped == 10)
    assert abs(null.mean() - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 200_000)
    np.testing.assert_array_equal(dropped[~null], labels[~null])
    assert drop_labels(jax.random.key(0), labels, 0, 0.1) is labels
    assert drop_labels(jax.random.key(0), labels, 10, 0.0) is labels


def test_the_step_drops_the_condition(tiny):
    config = tiny.config(model={"class_dropout_prob": 0.5}, train={"batch_size": 128})
    kind, batch = condition_of(config), tiny.batch(0, 128)
    inputs = make_draws(config, kind, create_process(config.diffusion), 1.0, 0.0)(batch, jnp.zeros((), int))
    labels = np.asarray(inputs["condition"]["label"])
    null = labels == kind.null["label"]
    assert 32 < null.sum() < 96
    np.testing.assert_array_equal(labels[~null], batch["label"][~null])


def test_draws_differ_by_seed_step_and_purpose():
    keys = [draw_key(seed, step, p) for seed in (0, 1) for step in (0, 1) for p in Draw]
    assert len({tuple(np.asarray(jax.random.key_data(k))) for k in keys}) == len(keys)


def test_decay_touches_matrices_only(tiny, five_steps):
    params = five_steps[1][1].params
    optimizer = make_optimizer(tiny.config(optim={"weight_decay": 0.5, "learning_rate": 0.1}))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)

    def check(path, update, value):
        expected = -0.05 * value if path[-1].key in ("kernel", "embedding") else 0 * value
        np.testing.assert_allclose(update, expected, rtol=1e-6)

    jax.tree_util.tree_map_with_path(check, updates, params)


def test_learning_rate_schedules(tiny):
    def at(n, **optim):
        return float(
            learning_rate(tiny.config(optim={"learning_rate": 1.0} | optim, train={"steps": 100}))(n)
        )

    assert at(0) == at(99) == 1.0
    warm = {"warmup_steps": 10}
    np.testing.assert_allclose(
        [at(0, **warm), at(4, **warm), at(9, **warm), at(50, **warm)], [0.1, 0.5, 1, 1], 1e-6
    )
    assert at(55, schedule="cosine", warmup_steps=10) == pytest.approx(0.5, abs=1e-6)
    assert (
        at(100, schedule="linear")
        == at(100, schedule="cosine", warmup_steps=10)
        == pytest.approx(0, abs=1e-7)
    )


@pytest.mark.usefixtures("default_precision")
def test_it_learns(tiny):
    config = tiny.config(
        optim={"learning_rate": 3e-3}, model={"conditioning": "adaln"}, diffusion={"learn_sigma": False}
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = build_program(config, mesh, scaling_factor=1.0, shift_factor=0.0)
    state, losses = program.init(), []
    rng = np.random.default_rng(0)
    mean = np.broadcast_to(rng.normal(size=(4, 1, 1, 1, 4)), (4, 2, 8, 8, 4))  # one colour per class
    moments = np.concatenate([mean, np.full_like(mean, 0.01)], axis=-1).astype(np.float16)
    for _ in range(150):
        label = rng.integers(0, 4, 16).astype(np.int32)
        batch = {"moments": moments[label], "label": label}
        state, metrics = program.step(state, jax.device_put(batch, batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[:5]) > 0.9  # the zero-initialised output predicts no noise at all
    assert np.mean(losses[-20:]) < 0.4


def test_summary_of_no_steps():
    line = summarise(jax.device_get(zero_totals()))
    assert line["skipped"] == 0
    assert not any(name.startswith("loss") for name in line)  # there is none, which is no loss of 0
