"""Writing a dataset: contents, metadata, refusals."""

import json
import multiprocessing
import os
import re
import signal

import numpy as np
import pytest

from dit_jax.conditions import LabelCondition
from dit_jax.data.decode import decoded
from dit_jax.data.encode import UNFINISHED, prepare
from dit_jax.data.latents import LatentDataset
from dit_jax.data.metadata import DataError, LatentMetadata, load_metadata
from dit_jax.data.records import parse, serialize, tfds_features


@pytest.fixture(scope="module")
def source(random_source):
    return random_source(count=50)


@pytest.fixture(scope="module")
def dataset(source, fake_encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("set") / "latents"
    prepare(source, fake_encoder(), out, image_size=16, shard_size=16, batch_size=2)
    return LatentDataset(out)


def test_stores_the_moments_of_image_and_mirror(source, dataset, moments_of):
    found = dataset.read(range(50))
    assert found["moments"].dtype == np.float16
    assert found["label"].dtype == np.int32
    np.testing.assert_allclose(found["moments"], moments_of(source), atol=2e-3)
    np.testing.assert_array_equal(found["label"], source.labels)
    assert dataset.ids([0, 49, 17]) == ["0", "49", "17"]


def test_metadata_states_how_and_what(dataset):
    m = dataset.metadata
    assert (m.source, m.count, m.source_count, m.num_classes) == ("random", 50, 50, 5)
    assert (m.vae, m.vae_hash, m.scaling_factor, m.shift_factor) == ("fake", "f" * 64, 0.5, 0.25)
    assert (m.latent_shape, m.moments_shape) == ((4, 4, 2), (2, 4, 4, 4))
    assert (m.image_size, m.crop, m.mirrors, m.dtype) == (16, "adm_center", True, "float16")
    assert m.label_names == tuple(f"class {i}" for i in range(5))
    assert m.shard_counts == (16, 16, 16, 2)
    assert LatentMetadata.from_json(m.to_json()) == m


def test_latent_statistics_are_those_of_drawn_latents(dataset):
    mean, std = np.split(dataset.read(range(50))["moments"].astype(np.float64), 2, axis=-1)
    draws = mean + std * np.random.default_rng(0).standard_normal((200, *mean.shape))
    np.testing.assert_allclose(dataset.metadata.latent_mean, draws.mean(axis=(0, 1, 2, 3, 4)), atol=2e-3)
    np.testing.assert_allclose(dataset.metadata.latent_std, draws.std(axis=(0, 1, 2, 3, 4)), rtol=2e-3)


def test_plain_tfds_opens_it(source, dataset):
    import tensorflow_datasets as tfds

    data = tfds.builder_from_directory(dataset.directory).as_data_source(split="train")
    assert len(data) == 50
    expected = dataset.read([33])
    assert data[33]["id"] == b"33"
    assert data[33]["label"] == expected["label"][0]
    np.testing.assert_array_equal(data[33]["moments"], expected["moments"][0])


def test_record_bytes_are_those_of_tfds_own_serializer(dataset):
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = tfds_features(dataset.metadata)
    moments = np.random.default_rng(1).standard_normal(dataset.metadata.moments_shape).astype(np.float16)
    record = serialize("a/b.png", {"label": 300}, moments)
    example = ExampleSerializer(features.get_serialized_info()).get_tf_example(
        features.encode_example({"id": "a/b.png", "label": 300, "moments": moments})
    )
    assert record == example.SerializeToString(deterministic=True)
    assert parse(record, LabelCondition.fields) == (b"a/b.png", {"label": 300}, moments.tobytes())


def test_nothing_but_the_dataset_is_left(dataset):
    names = sorted(path.name for path in dataset.directory.iterdir())
    shards = [f"latents-train.array_record-{i:05d}-of-00004" for i in range(4)]
    assert names == ["dataset_info.json", "features.json", *shards, "metadata.json"]


def test_without_mirrors_and_in_float32(source, fake_encoder, moments_of, tmp_path):
    prepare(
        source, fake_encoder(), tmp_path / "set", image_size=16, mirrors=False, dtype="float32", batch_size=1
    )
    dataset = LatentDataset(tmp_path / "set")
    assert dataset.record_shape == (1, 4, 4, 4)
    np.testing.assert_allclose(
        dataset.read(range(50))["moments"], moments_of(source, mirrors=False, dtype=np.float32), atol=1e-5
    )


def test_workers_change_nothing(source, fake_encoder, dataset, tmp_path):
    prepare(source, fake_encoder(), tmp_path / "set", image_size=16, shard_size=16, batch_size=2, workers=2)
    assert contents(tmp_path / "set") == contents(dataset.directory)


def test_workers_leave_an_interruption_to_their_parent(source):
    """Ctrl-C goes to every process of a terminal: a dying worker would print its own traceback."""
    with decoded(source, range(50), 8, workers=1) as examples:
        first = next(examples)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
        assert [first.id, *(example.id for example in examples)] == [str(i) for i in range(50)]


def test_processes_change_nothing(source, fake_encoder, dataset, tmp_path):
    out, options = tmp_path / "set", {"image_size": 16, "shard_size": 16, "batch_size": 2, "process_count": 3}
    assert prepare(source, fake_encoder(), out, process_index=1, **options) is None
    with pytest.raises(DataError, match="holds no finished latent dataset"):
        LatentDataset(out)
    assert prepare(source, fake_encoder(), out, process_index=0, **options) is None
    assert prepare(source, fake_encoder(), out, process_index=2, **options) == dataset.metadata
    assert contents(out) == contents(dataset.directory)


def test_an_interruption_changes_nothing(source, fake_encoder, dataset, tmp_path):
    """The third shard's encoding fails; the rerun begins there."""
    out, options = tmp_path / "set", {"image_size": 16, "shard_size": 16, "batch_size": 1}
    calls = []

    def failing(after):
        good = fake_encoder().compile(True, "float16")

        def moments(images):
            calls.append(len(images))
            if len(calls) > after:
                raise RuntimeError("power cut")
            return good(images)

        return fake_encoder(compile=lambda mirrors, dtype: moments)

    with pytest.raises(RuntimeError, match="power cut"):
        prepare(source, failing(after=5), out, **options)
    assert sorted(path.name[-14:] for path in out.glob("latents*")) == ["00000-of-00004", "00001-of-00004"]
    calls.clear()
    prepare(source, failing(after=100), out, **options)
    assert len(calls) == 3  # 16 + 2 images, 8 at once
    prepare(source, fake_encoder(), tmp_path / "other", **options)
    assert contents(out) == contents(tmp_path / "other")


def test_what_a_killed_process_was_writing_is_removed_before_work_goes_on(source, fake_encoder, tmp_path):
    out, options = tmp_path / "set", {"image_size": 16, "shard_size": 16, "batch_size": 2}
    prepare(source, fake_encoder(), out, process_count=2, **options)  # the shards 0 and 2
    partial = out / UNFINISHED / "shard-00001-0badf00d"
    partial.write_bytes(b"half")
    prepare(source, fake_encoder(), out, process_count=2, **options)
    assert partial.exists()  # it may be another process's that still lives

    def compiled(mirrors, dtype):
        def moments(images):
            assert not partial.exists()
            return good(images)

        good = fake_encoder().compile(mirrors, dtype)
        return moments

    assert prepare(source, fake_encoder(compile=compiled), out, **options) is not None


def test_one_that_another_overtakes_ends_with_the_same_dataset(source, fake_encoder, dataset, tmp_path):
    """As where the file system has no locks: the other one finishes first and clears up."""
    out, options = tmp_path / "set", {"image_size": 16, "shard_size": 16, "batch_size": 2}

    def overtaken(mirrors, dtype):
        def moments(images):
            if not (out / "metadata.json").exists():
                prepare(source, fake_encoder(), out, **options)
            return good(images)

        good = fake_encoder().compile(mirrors, dtype)
        return moments

    assert prepare(source, fake_encoder(compile=overtaken), out, **options) == dataset.metadata
    assert contents(out) == contents(dataset.directory)


def test_a_finished_dataset_is_left_alone(source, fake_encoder, dataset):
    before = contents(dataset.directory)
    found = prepare(source, fake_encoder(), dataset.directory, image_size=16, shard_size=16, batch_size=2)
    assert found == dataset.metadata
    assert contents(dataset.directory) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_size": 12},
            r"holds a finished dataset with latent_shape \[4, 4, 2\], but this run has \[3, 3, 2\]",
        ),
        ({"mirrors": False}, "with mirrors True, but this run has False"),
        ({"image_size": 18}, "--image-size is 18; expected a multiple of the VAE's factor 4"),
        ({"process_index": 1}, "--process-index is 1; expected 0 to 0"),
        ({"batch_size": 0}, "--batch-size is 0; expected 1 or more"),
        ({"shard_size": 0}, "--shard-size is 0; expected 1 or more"),
        ({"workers": -1}, "--workers is -1; expected 0 or more"),
        ({"workers": 10**6}, "--workers is 1000000; expected at most 1024"),
        (
            {"batch_size": 10**12},
            r"--batch-size is 1000000000000 and --image-size 16: batches of \d+ MB, but",
        ),
        ({"image_size": 4 * 10**9}, r"--image-size 4000000000: batches of \d+ MB, but there are \d+ MB"),
    ],
)
def test_contradictions_are_refused(source, fake_encoder, dataset, options, message):
    with pytest.raises(DataError, match=message):
        prepare(
            source, fake_encoder(), dataset.directory,
            **({"image_size": 16, "shard_size": 16, "batch_size": 2} | options),
        )  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), [("{", "cannot be read"), ("[]", "holds no recipe")])
def test_a_damaged_recipe_is_named(source, fake_encoder, tmp_path, text, sentence):
    file = tmp_path / ".unfinished" / "recipe.json"
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(DataError, match=rf"recipe\.json {sentence}"):
        prepare(source, fake_encoder(), tmp_path, image_size=16)


def test_another_unfinished_dataset_is_refused(source, fake_encoder, tmp_path):
    options = {"image_size": 16, "shard_size": 16, "process_count": 2}
    prepare(source, fake_encoder(), tmp_path, **options)
    with pytest.raises(DataError, match=r"unfinished dataset with vae_hash 'ffff.*, but this run has '0000"):
        prepare(source, fake_encoder(vae_hash="0" * 64), tmp_path, **options)


def test_a_folder_with_other_files_is_refused(source, fake_encoder, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DataError, match="is not empty and holds no dataset"):
        prepare(source, fake_encoder(), tmp_path, image_size=16)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_moments_beyond_float16_are_refused(source, fake_encoder, tmp_path):
    def huge(mirrors, dtype):
        return lambda images: np.full((len(images), 2, 4, 4, 4), np.inf, dtype)

    with pytest.raises(DataError, match="moments of 0 are not finite in float16"):
        prepare(source, fake_encoder(compile=huge), tmp_path / "set", image_size=16)
    assert not list((tmp_path / "set").glob("latents*"))
    assert not list((tmp_path / "set" / UNFINISHED).glob("shard*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(version=2), "has version 2; this program reads version 1"),
        (lambda d: d.pop("vae"), "vae: field required"),
        (lambda d: d.update(colour="red"), "colour: "),
        (lambda d: d.update(count="many"), "count: input should be a valid integer"),
    ],
)
def test_damaged_metadata_is_refused(dataset, tmp_path, damage, message):
    data = json.loads(dataset.metadata.to_json())
    damage(data)
    (tmp_path / "metadata.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path))}.*{message}"):
        load_metadata(tmp_path)


def contents(directory):
    """Every file's bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
