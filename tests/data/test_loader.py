"""The order of the records, batches on devices, drawing latents, and what a run refuses."""

import contextlib
import dataclasses
import itertools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.config import Config, ConfigError, DataConfig, ModelConfig, parse_args, to_json
from dit_jax.data import latents, loader
from dit_jax.data.encode import prepare
from dit_jax.data.latents import LatentDataset, check_dataset, draw_latents, open_dataset
from dit_jax.data.loader import batch_indices, batches, check_memory, epoch_order, local_rows, to_global
from dit_jax.data.metadata import DataError


@pytest.fixture(scope="module")
def dataset(random_source, fake_encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("set") / "latents"
    prepare(random_source(count=50), fake_encoder(), out, image_size=16, shard_size=16, batch_size=2)
    return LatentDataset(out)


def sharding(devices=8, tensor=1):
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(-1, tensor), ("data", "tensor"))
    return NamedSharding(mesh, PartitionSpec("data"))


# --------------------------------------------------------------------------------------------- order


def test_every_epoch_visits_every_record_once():
    n, batch_size = 50, 16
    stream = np.concatenate([batch_indices(3, step, batch_size, n) for step in range(25)])
    epochs = stream.reshape(8, n)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_a_batch_may_be_larger_than_the_set():
    stream = np.concatenate([batch_indices(0, step, 24, 10) for step in range(5)])
    for epoch in stream.reshape(12, 10):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))


def test_order_depends_on_the_seed_and_is_fixed_for_good():
    assert not np.array_equal(epoch_order(0, 0, 50), epoch_order(1, 0, 50))
    # Recorded: another NumPy or another machine must replay the same run.
    assert epoch_order(7, 2, 10).tolist() == [6, 7, 8, 4, 0, 1, 5, 3, 9, 2]


def test_order_is_shuffled():
    order = epoch_order(0, 0, 10_000)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.03


# ------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("cache", ["none", "ram", "device"])
@pytest.mark.parametrize("where", [{"devices": 8}, {"devices": 1}, {"devices": 4, "tensor": 2}])
def test_batches_hold_the_rows_of_the_order(dataset, cache, where):
    split = sharding(**where)
    with contextlib.closing(batches(dataset, 16, 3, 2, split, cache=cache)) as stream:
        for step, batch in zip(range(2, 7), stream, strict=False):
            expected = dataset.read(batch_indices(3, step, 16, 50))
            assert batch["moments"].shape == (16, 2, 4, 4, 4)
            assert batch["moments"].sharding.is_equivalent_to(split, 5)
            assert batch["label"].sharding.is_equivalent_to(split, 1)
            np.testing.assert_array_equal(batch["moments"], expected["moments"])
            np.testing.assert_array_equal(batch["label"], expected["label"])


def test_resuming_needs_only_the_step(dataset):
    with contextlib.closing(batches(dataset, 16, 0, 0, sharding())) as stream:
        labels = [np.asarray(batch["label"]) for batch in itertools.islice(stream, 6)]
    with contextlib.closing(batches(dataset, 16, 0, 4, sharding())) as stream:
        resumed = [np.asarray(batch["label"]) for batch in itertools.islice(stream, 2)]
    np.testing.assert_array_equal(resumed, labels[4:])


def test_a_process_holds_only_its_devices_rows(monkeypatch):
    """One of several processes: its devices' rows are a part of the batch, and not contiguous."""
    mine = [(slice(12, 14), slice(None)), (slice(2, 4), slice(None)), (slice(6, 8), slice(None))]

    class Part:
        def addressable_devices_indices_map(self, shape):
            return dict(enumerate(index[:1] for index in mine))

    rows = local_rows(Part(), 16)
    np.testing.assert_array_equal(rows, [2, 3, 6, 7, 12, 13])
    batch = np.random.default_rng(0).standard_normal((16, 3))
    # JAX asks for the pieces of this process's devices alone.
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, part, piece: [piece(i) for i in mine])
    for index, piece in zip(mine, to_global(rows, batch[rows], 16, Part()), strict=True):
        np.testing.assert_array_equal(piece, batch[index])


def test_batches_read_the_image_alone_where_no_mirror_is_wanted(dataset):
    plain = LatentDataset(dataset.directory, mirror=False)
    np.testing.assert_array_equal(plain.read([4, 2])["moments"], dataset.read([4, 2])["moments"][:, :1])


def test_a_batch_that_does_not_split_is_refused(dataset):
    with pytest.raises(ConfigError, match=r"--train.batch-size is 12, which does not split evenly"):
        batches(dataset, 12, 0, 0, sharding())


def test_a_cache_that_does_not_fit_is_refused(dataset, monkeypatch):
    monkeypatch.setattr(LatentDataset, "record_bytes", 10**15)
    with pytest.raises(ConfigError, match=r"--data.cache is ram, which needs 50000000.0 GB"):
        batches(dataset, 16, 0, 0, sharding(), cache="ram")


def test_memory_is_counted_for_every_process_and_device_of_a_host(dataset, monkeypatch):
    size = 50 * dataset.record_bytes
    monkeypatch.setattr(loader, "_host", lambda: (1, 20 * size))
    for cache in ("none", "ram", "device"):  # eight devices of the host's memory, and the copy that they get
        check_memory(dataset, 16, cache, workers=1)
    monkeypatch.setattr(loader, "_host", lambda: (1, 8 * size))
    check_memory(dataset, 16, "ram", workers=1)
    with pytest.raises(ConfigError, match=r"--data.cache is device, which needs 0\.0 GB .* but there are"):
        check_memory(dataset, 16, "device", workers=1)
    monkeypatch.setattr(loader, "_host", lambda: (9, 8 * size))
    with pytest.raises(ConfigError, match=r"--data.cache is ram, .* records\) in 9 processes on a host, but"):
        check_memory(dataset, 16, "ram", workers=1)


def test_a_batch_beyond_memory_is_refused_before_it_is_made(dataset):
    with pytest.raises(
        ConfigError, match=r"--train.batch-size is 8\d+, of which \d+ are in memory at once: \d+"
    ):
        batches(dataset, 8 * 10**12, 0, 0, sharding())
    check_memory(dataset, 8 * 10**12, "device")  # only indices are made of it


def test_a_dataset_can_be_pickled_and_checks_indices(dataset):
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy.read([7])["moments"], dataset.read([7])["moments"])
    with pytest.raises(IndexError, match=r"indices 0..50 reach outside"):
        dataset.read([0, 50])


# --------------------------------------------------------------------------------------- draw_latents


def test_latents_are_drawn_scaled_and_mirrored():
    rng = np.random.default_rng(0)
    moments = np.concatenate([rng.normal(size=(512, 2, 4, 4, 2)), np.full((512, 2, 4, 4, 2), 0.5)], -1)
    moments[:, 1, ..., :2] += 100.0  # the mirror is far away
    batch = {"moments": jnp.asarray(moments, jnp.float32)}
    z = draw_latents(batch, jax.random.key(0), 2.0, 1.0, mirror=True) / 2.0 + 1.0
    mirrored = np.asarray(z).mean(axis=(1, 2, 3)) > 50
    assert 0.4 < mirrored.mean() < 0.6
    mean = np.where(mirrored[:, None, None, None], moments[:, 1, ..., :2], moments[:, 0, ..., :2])
    noise = (np.asarray(z) - mean) / 0.5
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03

    plain = draw_latents(batch, jax.random.key(0), 1.0, 0.0, mirror=False)
    assert np.abs(plain).max() < 50


def test_drawing_does_not_depend_on_devices():
    moments = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2, 4, 4, 4)), jnp.float16)
    draw = jax.jit(lambda m: draw_latents({"moments": m}, jax.random.key(1), 0.5, 0.0, mirror=True))
    one = draw(jax.device_put(moments, sharding(devices=1)))
    np.testing.assert_array_equal(one, draw(jax.device_put(moments, sharding(devices=8))))


def test_mirror_needs_two_views():
    with pytest.raises(ValueError, match="mirror needs image and mirror"):
        draw_latents({"moments": jnp.zeros((2, 1, 4, 4, 4))}, jax.random.key(0), 1.0, 0.0, mirror=True)


# --------------------------------------------------------------------------------------- open_dataset


def config_for(dataset, **data):
    model = ModelConfig(input_size=(4, 4), in_channels=2, num_classes=5)
    return Config(model=model, data=DataConfig(dir=str(dataset.directory), **data))


def test_open_dataset_accepts_what_fits(dataset):
    assert len(open_dataset(config_for(dataset))) == 50
    unconditional = dataclasses.replace(config_for(dataset).model, num_classes=0)
    check_dataset(dataset.metadata, dataclasses.replace(config_for(dataset), model=unconditional))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"input_size": (8, 4)}, r"latents of \(height, width, channels\) = \(4, 4, 2\); .* say \(8, 4, 2\)"),
        ({"in_channels": 4}, r"= \(4, 4, 2\); .* say \(4, 4, 4\)"),
        ({"num_classes": 6}, "has 5 classes; --model.num-classes says 6"),
    ],
)
def test_open_dataset_refuses_a_model_that_does_not_fit(dataset, model, message):
    config = config_for(dataset)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    with pytest.raises(ConfigError, match=message):
        open_dataset(config)


def test_open_dataset_refuses_another_vae(dataset, monkeypatch):
    monkeypatch.setattr("dit_jax.interop.diffusers.weights_hash", lambda name: "0" * 64)
    with pytest.raises(
        ConfigError, match=r"encoded by fake with weights ffffffffffff; --data.vae other has weights 0000"
    ):
        open_dataset(config_for(dataset, vae="other"))


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        ("/no/such/folder", "'/no/such/folder' is not a folder; expected a folder, a hub id such as"),
        ("nobody/nothing", "'nobody/nothing' is neither a folder nor a hub repository within reach: Cannot"),
        ("~nobody/nothing", "'~nobody/nothing' is not a folder"),
    ],
)
def test_a_vae_that_is_not_there_is_one_sentence(dataset, vae, message):
    with pytest.raises(ConfigError, match=f"^--data.vae: autoencoder {message}") as refusal:
        open_dataset(config_for(dataset, vae=vae))
    assert not re.search(r"[.:]\s+[A-Z].*[.]\s|\n", str(refusal.value))


def test_open_dataset_refuses_missing_mirrors(dataset, tmp_path):
    metadata = dataclasses.replace(dataset.metadata, mirrors=False)
    with pytest.raises(ConfigError, match=r"holds no mirror images; set --data.no-mirror") as refusal:
        check_dataset(metadata, config_for(dataset))
    (option,) = re.findall(r"set (\S+),", str(refusal.value))
    recipe = tmp_path / "config.json"
    recipe.write_text(to_json(config_for(dataset)))
    check_dataset(metadata, parse_args(["--config", str(recipe), option]))  # what it says helps


def test_open_dataset_names_the_command_where_there_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match=r"does not exist .*python prepare.py --source"):
        open_dataset(Config(data=DataConfig(dir=str(tmp_path / "none"))))
    with pytest.raises(ConfigError, match=r"--data.dir is empty"):
        open_dataset(Config())


def test_a_missing_or_cut_shard_is_refused(dataset, tmp_path):
    for path in dataset.directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / dataset.shards[1].name
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"00001-of-00004 has \d+ bytes; metadata.json says"):
        LatentDataset(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match="has no file bytes"):
        LatentDataset(tmp_path)


def test_digits_are_prepared_at_first_use(tmp_path, monkeypatch, fake_encoder):
    calls = []

    def encoder(vae):
        calls.append(vae)
        return fake_encoder()

    monkeypatch.setattr("dit_jax.data.encoders.flax_encoder", encoder)
    model = ModelConfig(input_size=(8, 8), in_channels=2, num_classes=10)
    config = Config(model=model, data=DataConfig(dir=str(tmp_path / "digits"), source="digits", mirror=False))
    dataset = latents.open_dataset(config)
    assert (dataset.metadata.mirrors, dataset.metadata.label_names) == (False, tuple("0123456789"))
    assert len(dataset) > 1400
    latents.open_dataset(config)
    assert calls == ["digits"]
