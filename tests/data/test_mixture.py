"""Several datasets in one run, each with its weight: the order, what is read, what is refused, and resuming."""

import contextlib
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from datasets_like import copy_with
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.conditions import LabelCondition, TextCondition
from dit_jax.config import Config, ConfigError, DataConfig, from_json, parse_args, resolve, to_json
from dit_jax.data.encode import prepare
from dit_jax.data.latents import LatentDataset, open_dataset
from dit_jax.data.loader import batches, order_of
from dit_jax.data.metadata import LatentMetadata, StoredText, load_metadata
from dit_jax.data.mixture import check_parts
from dit_jax.data.order import BLOCK, MixedOrder, counts_before, drawn_parts, whole_weights
from dit_jax.runs.checkpoint import CheckpointError
from dit_jax.training.loop import train

WEIGHTS = (3.0, 0.5, 1.5)
SIZES = (40, 7, 300)


# --------------------------------------------------------------------------------------------- order


def test_weights_are_whole_numbers_as_they_are_written():
    assert whole_weights([3.0, 1.0]) == (3, 1)
    assert whole_weights([0.1, 0.2, 0.7]) == (1, 2, 7)
    assert whole_weights([1e-6, 1.0]) == (1, 10**6)
    assert whole_weights([2.0, 2.0]) == (1, 1)


@pytest.mark.parametrize("weights", [(1,), (3, 1), (6, 1, 3), (1, 10**6, 7, 7), (10**30, 1, 10**29)])
def test_every_draw_is_of_one_part_and_shares_never_drift(weights):
    for first in (0, 10**12 + 7):
        draws = first + np.arange(2000)
        counts = counts_before(weights, draws)
        one_by_one = [counts_before(weights, draws[i : i + 1].astype(object)) for i in (0, 1234, 1999)]
        assert (np.concatenate(one_by_one, axis=1) == counts[:, [0, 1234, 1999]]).all()
        steps = np.diff(counts.astype(object), axis=1)
        assert (counts.sum(axis=0) == draws).all() and (steps.sum(axis=0) == 1).all() and steps.min() >= 0
        total, counts = sum(weights), counts.astype(object)
        away = [abs(count * total - n * w) for w, row in zip(weights, counts, strict=True)
                for count, n in zip(row, draws.tolist(), strict=True)]  # fmt: skip
        assert max(away) <= max(1, len(weights) - 1) * total  # in units of 1 / total, without rounding


def test_parts_have_their_shares_in_every_window_and_no_period():
    weights = whole_weights(WEIGHTS)
    parts, before = drawn_parts(weights, 5, np.arange(200 * BLOCK))
    for part, weight in enumerate(WEIGHTS):
        of_part = before[parts == part]
        np.testing.assert_array_equal(of_part, np.arange(len(of_part)))  # one after the other, none twice
        in_blocks = (parts.reshape(-1, BLOCK) == part).sum(axis=1)
        assert abs(in_blocks - BLOCK * weight / 5.0).max() <= 2
        assert abs(len(of_part) - len(parts) * weight / 5.0) <= 2
    signal = (parts == 1) - 0.1
    autocorrelation = [abs(np.mean(signal[lag:] * signal[:-lag])) / 0.09 for lag in range(1, 100)]
    assert max(autocorrelation) < 6 / np.sqrt(len(parts))  # an even sequence has a 1 at lag 10
    assert not np.array_equal(parts, drawn_parts(weights, 6, np.arange(200 * BLOCK))[0])
    # Recorded: a run of months must not change its order.
    assert "".join(map(str, parts[:40])) == "2012002220220200102202001010220102000002"


def test_any_draw_is_known_without_those_before_it():
    weights = whole_weights(WEIGHTS)
    whole = drawn_parts(weights, 3, np.arange(1000))
    for first, last in ((0, 1), (63, 66), (517, 803)):
        for values, of_all in zip(drawn_parts(weights, 3, np.arange(first, last)), whole, strict=True):
            np.testing.assert_array_equal(values, of_all[first:last])
    far = drawn_parts(weights, 3, 10**15 + np.arange(10))
    assert (np.abs(far[1] - 10**15 * np.array(WEIGHTS)[far[0]] / 5.0) < 64).all()


@pytest.mark.parametrize("kinds", [("sorted",) * 3, ("keyed", "sorted", "keyed")])
def test_within_a_part_every_epoch_visits_every_record_once(kinds):
    order = MixedOrder(2, 48, SIZES, whole_weights(WEIGHTS), kinds=kinds)
    stream = np.concatenate([order[step] for step in range(60)])
    ends = np.cumsum(SIZES)
    for first, last, n in zip(ends - SIZES, ends, SIZES, strict=True):
        records = stream[(stream >= first) & (stream < last)] - first
        for epoch in range(len(records) // n):
            np.testing.assert_array_equal(np.sort(records[epoch * n : epoch * n + n]), np.arange(n))
        assert len(records) > n / 3
    later = dataclasses.replace(order, start=50)
    np.testing.assert_array_equal(later[3], order[53])


def test_parts_of_one_size_are_ordered_apart():
    order = MixedOrder(0, 64, (1000, 1000), (1, 1), kinds=("sorted", "sorted"))
    stream = np.concatenate([order[step] for step in range(20)])
    first, second = stream[stream < 1000][:500], stream[stream >= 1000][:500] - 1000
    assert np.mean(first == second) < 0.05


# ----------------------------------------------------------------------------------- reading, batches


@pytest.fixture(scope="module")
def folders(random_source, fake_encoder, tmp_path_factory):
    """Two datasets that fit together, of 50 and of 20 records."""
    root = tmp_path_factory.mktemp("parts")
    for name, count in (("a", 50), ("b", 20)):
        source = random_source(count=count, seed=count)
        prepare(source, fake_encoder(), root / name, image_size=16, shard_size=16, batch_size=2)
    return str(root / "a"), str(root / "b")


def config_of(folders, weights=(3.0, 1.0), **data):
    base = Config(data=DataConfig(mixture=tuple(zip(folders, weights, strict=False)), **data))
    return dataclasses.replace(
        base, model=dataclasses.replace(base.model, input_size=(4, 4), in_channels=2, num_classes=5)
    )


def sharding(devices=8):
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec("data"))


def test_a_mixture_reads_the_records_of_its_parts(folders):
    mixture, parts = open_dataset(config_of(folders)), [LatentDataset(folder) for folder in folders]
    assert len(mixture) == 70 and mixture.record_shape == parts[0].record_shape
    found = mixture.read([69, 3, 50, 49])
    for row, (part, record) in enumerate([(1, 19), (0, 3), (1, 0), (0, 49)]):
        expected = parts[part].read([record])
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name][row], values[0])
    with pytest.raises(IndexError, match="Mixture of 2 datasets, 70 records"):
        mixture.read([70])
    condition, captions = mixture.examples(7)
    assert condition["label"].shape == (7,) and captions == []
    m = LatentMetadata.from_json(mixture.metadata.to_json())
    assert m.label_names == parts[0].metadata.label_names and m.scaling_factor == 0.5 and m.count == 70
    means = [part.metadata.latent_mean[0] for part in parts]
    assert m.latent_mean[0] == pytest.approx(0.75 * means[0] + 0.25 * means[1])


@pytest.mark.parametrize("cache", ["none", "ram", "device"])
def test_batches_are_those_of_the_order_for_any_devices_and_from_any_step(folders, cache):
    mixture = open_dataset(config_of(folders))
    order = order_of(mixture, 16, 3, 0, "sorted")
    for devices, first in ((8, 0), (2, 5)):
        with contextlib.closing(batches(mixture, 16, 3, first, sharding(devices), cache)) as stream:
            for step, batch in enumerate(itertools.islice(stream, 3), first):
                expected = mixture.read(order[step])
                for name, values in expected.items():
                    np.testing.assert_array_equal(batch[name], values)
    rows = np.concatenate([order[step] for step in range(16)])
    assert abs(np.sum(rows < 50) - 192) <= 1  # three quarters of 256


# ---------------------------------------------------------------------------------- what is refused

CHANGES = [
    ({"latent_shape": (8, 4, 2)}, r"b has latents of \(height, width, channels\) \(8, 4, 2\), but"),
    ({"dtype": "float32"}, "b has type float32, but .*a has float16"),
    ({"vae_hash": "e" * 64}, "b has autoencoder e{12}, but .*a has f{12}"),
    ({"scaling_factor": 0.25}, r"b has scaling and shift factor \(0.25, 0.25\), but"),
    ({"num_classes": 4}, "b has classes 4, but .*a has 5"),
    ({"label_names": tuple("edcba")}, r"b has class names \('e', 'd', .*\), but"),
    ({"count": 0}, "b is empty; expected at least one record"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_parts_that_do_not_fit_together_are_refused(folders, change, message):
    found = [load_metadata(folder) for folder in folders]
    check_parts(folders, found, LabelCondition(5))
    with pytest.raises(ConfigError, match=f"^--data.mixture: .*{message}"):
        check_parts(folders, [found[0], dataclasses.replace(found[1], **change)], LabelCondition(5))


def test_what_a_run_does_not_use_may_differ(folders):
    found = [load_metadata(folder) for folder in folders]
    check_parts(folders, [found[0], dataclasses.replace(found[1], num_classes=0)], LabelCondition(0))
    check_parts(folders, [found[0], dataclasses.replace(found[1], label_names=())], LabelCondition(5))
    texts = [
        dataclasses.replace(m, text=StoredText("qwen", w, 8, 4)) for m, w in zip(found, "ab", strict=True)
    ]
    check_parts(folders, texts, TextCondition("bytes", 16))
    with pytest.raises(ConfigError, match=r"text embeddings .*weights='b'.*weights='a'"):
        check_parts(folders, texts, TextCondition("qwen", 8, 4))


def test_a_part_that_contradicts_the_config_is_named(folders):
    config = config_of(folders)
    wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=7))
    with pytest.raises(ConfigError, match=r"the dataset in .*a has 5 classes; --model.num-classes says 7"):
        open_dataset(wrong)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ((("a", 0.0),), r"^--data.mixture is a 0.0; expected weights above 0"),
        ((("a", -1.0), ("b", 1.0)), r"^--data.mixture is a -1.0; expected weights above 0"),
        ((("a", 1.0), ("a", 2.0)), r"^--data.mixture is a twice; expected each folder once"),
        ((("", 1.0),), r"^--data.mixture is a part without a name"),
        ((("a", float("nan")),), "^the config cannot|^--data.mixture"),
        ((("a\0", 1.0),), "^--data.mixture is 'a.*expected text"),
        ((("a", 1e-40),), "^--data.mixture is .*1e-40.*; expected a number that float32 holds"),
    ],
)
def test_a_mixture_that_is_none_is_refused(mixture, message):
    with pytest.raises(ConfigError, match=message):
        resolve(Config(data=DataConfig(mixture=mixture)))


# ------------------------------------------------------------------------------------- config, runs


def test_the_command_line_and_the_file_say_the_same(tmp_path):
    config = parse_args(["--data.mixture", "data/a", "3", "data/b", "0.5"])
    assert config.data.mixture == (("data/a", 3.0), ("data/b", 0.5))
    assert from_json(to_json(config)) == config
    without = json.loads(to_json(parse_args(["--data.mixture"])))
    assert "mixture" not in without["data"]  # a run without is written as before there were any


@pytest.fixture(scope="module")
def halves(latents, tmp_path_factory):
    """The dataset of 40 records, and a second one that is equal to it but for its metadata."""
    other = tmp_path_factory.mktemp("halves") / "other"
    copy_with(latents, other, source="another")
    return str(latents), str(other)


@pytest.mark.slow
def test_a_run_on_a_mixture_goes_on_and_keeps_its_weights(tiny, halves, tmp_path):
    def run(name, steps, weights=(3.0, 1.0), folders=halves):
        mixture = tuple(zip(folders, weights, strict=True))
        options = {"workdir": str(tmp_path / name), "steps": steps}
        return train(tiny.config(train=options, data={"mixture": mixture}))

    run("parts", 2)
    run("parts", 4)
    saved = LatentMetadata.from_json((tmp_path / "parts" / "dataset.json").read_text())
    assert (saved.label_names, saved.count, saved.source) == (
        tuple("abcd"),
        80,
        "mixture of random + another",
    )
    with pytest.raises(ConfigError, match=r"--data.mixture is .*; the run in .* has .*: go on with the same"):
        run("parts", 6, weights=(1.0, 1.0))
    (tmp_path / "parts" / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"another dataset \(fingerprint .*, --data.mixture .*other has"
    ):
        run("parts", 6, folders=halves[::-1])
