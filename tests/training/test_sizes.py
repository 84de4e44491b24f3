"""Latents of several sizes in one run: positions, the order of the batches, steps, resuming, samples."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets_like import copy_with

from dit_jax import DiT
from dit_jax.config import ConfigError, from_json, to_json
from dit_jax.data.latents import open_dataset
from dit_jax.data.loader import order_of
from dit_jax.data.metadata import LatentMetadata
from dit_jax.generation.command import SampleArgs, size_asked
from dit_jax.generation.sampling import (
    SamplingOptions,
    Told,
    device_mesh,
    latent_batches,
    make_latent_sampler,
    sampling_model,
)
from dit_jax.models import cost
from dit_jax.models.embeddings import sincos_positions
from dit_jax.models.mmdit import MMDiT
from dit_jax.training import throughput
from dit_jax.training.loop import train
from dit_jax.training.throughput import Throughput

SIZE = (4, 16)
SEED = 6  # with which both sizes are drawn within three steps


# ------------------------------------------------------------------------------------------ networks


def test_positions_of_another_grid_lie_around_the_same_middle():
    base = sincos_positions(6, 8, 16).reshape(6, 8, 16)
    np.testing.assert_array_equal(sincos_positions(6, 8, 16, (6, 8)), base.reshape(48, 16))
    cut = sincos_positions(2, 4, 16, (6, 8)).reshape(2, 4, 16)
    np.testing.assert_array_equal(cut, base[2:4, 2:6])
    beyond = sincos_positions(10, 8, 16, (6, 8)).reshape(10, 8, 16)
    np.testing.assert_array_equal(beyond[2:8], base)
    assert len(np.unique(beyond.reshape(80, 16), axis=0)) == 80
    odd = sincos_positions(3, 8, 16, (6, 8)).reshape(3, 8, 16)  # half a patch off, as Stable Diffusion 3's
    np.testing.assert_array_equal(odd, base[1:4])


def test_a_network_of_another_size_has_the_same_parameters():
    model = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=4)
    x, t, y = jnp.ones((1, 8, 8, 4)), jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), x, t, y)["params"]
    other = model.of_size(SIZE)
    assert other.num_tokens == 16 and other.base_size == (8, 8) and other.of_size((8, 8)).base_size == (8, 8)
    shapes = jax.eval_shape(other.init, jax.random.key(0), jnp.ones((1, *SIZE, 4)), t, y)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda a: rng.normal(0, 0.1, a.shape).astype(np.float32), params)
    there_and_back, here = (
        jax.jit(one.apply)({"params": moved}, x, t, y) for one in (other.of_size((8, 8)), model)
    )
    np.testing.assert_array_equal(there_and_back, here)
    assert jax.eval_shape(other.apply, {"params": moved}, jnp.ones((1, *SIZE, 4)), t, y).shape == (
        1,
        *SIZE,
        8,
    )
    assert MMDiT.named("MMDiT-2").of_size((64, 96)).grid_size == (32, 48)


# -------------------------------------------------------------------------------------- data, config


@pytest.fixture(scope="module")
def folders(latents, tmp_path_factory):
    """The dataset of 40 latents 8x8x4, and the same bytes as latents 4x16x4."""
    other = tmp_path_factory.mktemp("sizes") / "wide"
    copy_with(latents, other, latent_shape=(*SIZE, 4))
    return str(latents), str(other)


def config_of(tiny, folders, weights=(2.0, 1.0), sizes=(SIZE,), **parts):
    data = {"mixture": tuple(zip(folders, weights, strict=True)), "sizes": sizes} | parts.pop("data", {})
    return tiny.config(data=data, **parts)


def test_a_batch_is_of_one_part_and_epochs_go_on_within_it(tiny, folders):
    dataset = open_dataset(config_of(tiny, folders))
    assert dataset.metadata.latent_shape == (8, 8, 4) and len(dataset) == 80
    order = order_of(dataset, 16, 0, 0, "sorted")
    batches = np.stack([order[step] for step in range(192)])
    parts = batches // 40
    assert (parts == parts[:, :1]).all()
    assert [np.sum(parts[:, 0] == part) for part in (0, 1)] == [128, 64]
    for part in (0, 1):
        stream = batches[parts[:, 0] == part].reshape(-1) - 40 * part
        for epoch in stream[: len(stream) // 40 * 40].reshape(-1, 40):
            np.testing.assert_array_equal(np.sort(epoch), np.arange(40))
    later = order_of(dataset, 16, 0, 100, "sorted")
    np.testing.assert_array_equal(later[7], order[107])
    for step in range(6):
        size = (8, 8) if parts[step, 0] == 0 else SIZE
        assert dataset.read(order[step])["moments"].shape == (16, 2, *size, 8)


@pytest.mark.parametrize(
    ("sizes", "more", "message"),
    [
        (((8, 8),), {}, r"^--data.sizes is .*; expected each size once, and --model.input-size not among them"),
        (((4, 16), (4, 16)), {}, r"^--data.sizes is .*; expected each size once"),
        (((3, 16),), {}, r"^--data.sizes names \(3, 16\), which does not serve: .* divisible by --model.patch-size"),
        (((4, 16),), {"data": {"mixture": ()}}, "^--data.sizes is .*; expected none without a --data.mixture"),
        (((4, 16),), {"data": {"cache": "device"}}, "^--data.cache is device; expected none or ram with --data.s"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_serve_are_refused(tiny, folders, sizes, more, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tiny, folders, sizes=sizes, **more)


def test_parts_of_another_size_than_asked_for_are_refused(tiny, folders):
    with pytest.raises(
        ConfigError, match=r"wide has latents .* \(4, 16, 4\); .* say \(8, 8\) or \(16, 4\) and 4$"
    ):
        open_dataset(config_of(tiny, folders, sizes=((16, 4),)))
    with pytest.raises(
        ConfigError, match=r"^--data.mixture: .*wide has latents of .*; expected the same of all"
    ):
        open_dataset(config_of(tiny, folders, sizes=()))
    with pytest.raises(ConfigError, match=r"^--model.input-size is \(8, 8\); expected the size of a part"):
        open_dataset(config_of(tiny, folders[1:], weights=(1.0,)))
    config = config_of(tiny, folders)
    assert from_json(to_json(config)) == config and "sizes" not in to_json(tiny.config())


def test_a_size_is_asked_for_by_name(tiny, folders):
    config = config_of(tiny, folders)
    assert size_asked(SampleArgs(), config) == (8, 8) and size_asked(SampleArgs(size="4x16"), config) == SIZE
    with pytest.raises(
        ConfigError, match=r"^--size is '16x4'; expected 8x8 or 4x16, of which the run was trained"
    ):
        size_asked(SampleArgs(size="16x4"), config)
    with pytest.raises(ConfigError, match=r"^--size is 4x16 with --init-image; expected"):
        size_asked(SampleArgs(size="4x16", init_image="a.png"), config)


# ---------------------------------------------------------------------------------------------- runs


def test_rates_count_what_each_size_costs(tiny, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(throughput, "peak_flops", lambda kind: 1e9)
    config = tiny.config(data={"mixture": (("a", 1.0),), "sizes": ((16, 16),)})
    clock = Throughput(config, 8)
    assert clock.lap() == {}
    small, large = (cost.train_flops_per_image(cost.of_size(config, size)) for size in ((8, 8), (16, 16)))
    assert large > 4 * small
    for size in ((8, 8), (16, 16), (8, 8)):
        clock.count(size)
    with clock.paused():
        now[0] += 7.0
    now[0] += 2.0
    rates = clock.lap()
    assert rates["images_per_second"] == pytest.approx(3 * 16 / 2)
    assert rates["mfu"] == pytest.approx(16 * (2 * small + large) / 2 / 8e9)
    clock.count((8, 8))
    now[0] += 1.0
    assert clock.lap()["images_per_second"] == pytest.approx(16)


@pytest.mark.slow
def test_a_run_on_two_sizes_resumes_to_the_bit_and_is_sampled_at_both(tiny, folders, tmp_path, hurried):
    def run(name, steps, cache="none"):
        options = {
            "workdir": str(tmp_path / name),
            "steps": steps,
            "log_every": 2,
            "checkpoint_every": 100,
            "seed": SEED,
        }
        config = config_of(tiny, folders, train=options, data={"cache": cache})
        order = order_of(open_dataset(config), 16, SEED, 0, "sorted")
        assert {int(order[step][0]) // 40 for step in range(3)} == {
            0,
            1,
        }  # both before the stop, and after it
        assert {int(order[step][0]) // 40 for step in range(3, 6)} == {0, 1}
        return config, train(config)

    config, whole = run("whole", 6)
    run("parts", 3)
    _, resumed = run("parts", 6, cache="ram")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.params), jax.device_get(whole.params))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in lines)
    saved = LatentMetadata.from_json((tmp_path / "parts" / "dataset.json").read_text())
    assert saved.latent_shape == (8, 8, 4)

    mesh, labels = device_mesh(), {"label": np.zeros(8, np.int32)}
    for size in ((8, 8), SIZE):
        model = sampling_model(config, size)
        sampler = make_latent_sampler(model, config, SamplingOptions(steps=3), mesh, True)
        ((drawn, _),) = latent_batches(sampler, whole.ema[0], 0, Told(labels), 8, mesh)
        assert drawn.shape == (8, *size, 4) and np.isfinite(drawn).all()
