"""Captions in a dataset: what is stored, what is read, which one is drawn, what is refused."""

import contextlib
import dataclasses
import itertools
import os
import pickle

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from dit_jax.commands import prepare as prepare_command
from dit_jax.conditions import TextCondition, byte_tokens
from dit_jax.config import Config, ConfigError, DataConfig, ModelConfig
from dit_jax.config.text import TextConfig
from dit_jax.data import digits_text, inspection
from dit_jax.data.captions import caption_words
from dit_jax.data.embed import Embedder
from dit_jax.data.encode import prepare
from dit_jax.data.latents import LatentDataset, open_dataset
from dit_jax.data.loader import batch_indices, batches, check_memory
from dit_jax.data.metadata import DataError, LatentMetadata, StoredText
from dit_jax.data.records import Captions, serialize, tfds_features
from dit_jax.text.encoders import Embedded, open_encoder

COUNT, CHANNELS, POOLED, LENGTH = 50, 6, 5, 8
BYTES = TextCondition("bytes", 16)
SD3 = TextCondition("sd3", LENGTH, CHANNELS, POOLED, clip_widths=(2, 3))


class FakeEncoder:
    """A token for every letter, but at least none: of each its code, and the mean of them pooled."""

    channels, pooled, length, clip_widths, fingerprint = CHANNELS, POOLED, LENGTH, (2, 3), "a" * 64

    def encode(self, captions):
        found = []
        for caption in captions:
            codes = np.frombuffer(caption.encode()[:LENGTH], np.uint8).astype(np.float32) / 100
            tokens = codes[:, None] + np.arange(CHANNELS, dtype=np.float32)
            found.append(Embedded(tokens, np.full(POOLED, codes.mean(), np.float32)))
        return found


def embedder(dtype="float16"):
    encoder = FakeEncoder()
    stored = StoredText("sd3", encoder.fingerprint, LENGTH, CHANNELS, POOLED, (2, 3), dtype)
    return Embedder(stored, encoder)


def said(index):
    """One to four captions of a record, of several lengths."""
    return tuple(f"{'né' * (k + index % 3)}{index}.{k}" for k in range(1 + index % 4))


@pytest.fixture(scope="module")
def source(random_source):
    source = random_source(count=COUNT)
    source._captions, source.has_captions = [said(i) for i in range(COUNT)], True
    return source


def made(source, encoder, folder, **options):
    prepare(source, encoder, folder, image_size=16, shard_size=16, batch_size=2, **options)
    return folder


@pytest.fixture(scope="module")
def words(source, fake_encoder, tmp_path_factory):
    """Folder of a set with captions alone."""
    return made(source, fake_encoder(), tmp_path_factory.mktemp("set") / "words")


@pytest.fixture(scope="module")
def embedded(source, fake_encoder, tmp_path_factory):
    """Folder of a set with embeddings in bfloat16."""
    folder = tmp_path_factory.mktemp("set") / "embedded"
    return made(source, fake_encoder(), folder, embedder=embedder("bfloat16"))


def opened(folder, kind):
    return LatentDataset(folder, condition=kind)


def split_over(devices):
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec("data"))


def expected(kind, captions, dtype=np.float32):
    """The condition of captions, made here."""
    if kind.encoder == "bytes":
        return {"tokens": byte_tokens(captions, kind.length)}
    found = {
        "context": np.zeros((len(captions), LENGTH, CHANNELS), dtype),
        "mask": np.zeros((len(captions), LENGTH), bool),
        "pooled": np.zeros((len(captions), POOLED), dtype),
    }
    for row, part in enumerate(FakeEncoder().encode(captions)):
        n = len(part.tokens)
        found["context"][row, :n], found["mask"][row, :n] = part.tokens.astype(dtype), True
        found["pooled"][row] = part.pooled.astype(dtype)
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(np.asarray(found[name]), wanted[name], err_msg=name)


# -------------------------------------------------------------------------------------------- stored


def test_captions_lie_beside_what_a_set_of_labels_holds(words, embedded, source):
    for folder in (words, embedded):
        dataset = LatentDataset(folder)
        assert dataset.captions([0, 7, 49]) == [said(0), said(7), said(49)]
        assert dataset.metadata.captions == sum(len(said(i)) for i in range(COUNT))
        np.testing.assert_array_equal(dataset.read(range(COUNT))["label"], source.labels)
        assert LatentMetadata.from_json(dataset.metadata.to_json()) == dataset.metadata
    every = [caption for i in range(COUNT) for caption in said(i)]
    tokens = sum(min(LENGTH, len(caption.encode())) for caption in every)
    assert LatentDataset(embedded).metadata.caption_tokens == tokens


def test_a_set_without_captions_says_nothing_of_them(random_source, fake_encoder, tmp_path):
    made(random_source(count=4), fake_encoder(), tmp_path / "set")
    assert "caption" not in (tmp_path / "set" / "metadata.json").read_text()
    assert "caption" not in (tmp_path / "set" / "features.json").read_text()
    dataset = LatentDataset(tmp_path / "set")
    with pytest.raises(DataError, match="no caption"):
        dataset.captions([0])


@pytest.mark.parametrize("name", ["words", "embedded"])
def test_plain_tfds_opens_it(name, request):
    import tensorflow_datasets as tfds

    data = tfds.builder_from_directory(request.getfixturevalue(name)).as_data_source(split="train")
    record = data[7]
    assert [caption.decode() for caption in record["captions"]] == list(said(7))
    if name == "embedded":
        parts = FakeEncoder().encode(said(7))
        assert record["embedding_lengths"].tolist() == [len(part.tokens) for part in parts]
        tokens = np.concatenate([part.tokens for part in parts]).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(record["embeddings"]), tokens)
        pooled = np.stack([part.pooled for part in parts]).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(record["pooled"]), pooled)


def test_record_bytes_are_those_of_tfds_own_serializer(embedded):
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    metadata = dataclasses.replace(LatentDataset(embedded).metadata, text=embedder("float16").stored)
    features = tfds_features(metadata)
    rng = np.random.default_rng(0)
    parts = tuple(rng.standard_normal((n, CHANNELS)).astype(np.float16) for n in (3, 8))
    pooled = rng.standard_normal((2, POOLED)).astype(np.float16)
    moments = rng.standard_normal(metadata.moments_shape).astype(np.float16)
    record = serialize("a", {"label": 3}, moments, Captions(("one", "zwölf"), parts, pooled))
    example = {
        "id": "a", "label": 3, "moments": moments, "captions": ["one", "zwölf"],
        "embeddings": np.concatenate(parts), "embedding_lengths": np.array([3, 8]), "pooled": pooled,
    }  # fmt: skip
    own = ExampleSerializer(features.get_serialized_info()).get_tf_example(features.encode_example(example))
    assert record == own.SerializeToString(deterministic=True)


# ---------------------------------------------------------------------------------------------- read


@pytest.mark.parametrize(("name", "kind"), [("words", BYTES), ("embedded", BYTES), ("embedded", SD3)])
def test_the_fields_that_the_condition_asks_for_are_read(name, kind, request):
    dataset = opened(request.getfixturevalue(name), kind)
    dtype = ml_dtypes.bfloat16
    rows = [49, 0, 7, 18]
    found = dataset.read(rows)
    assert_same({key: found[key] for key in kind.fields}, expected(kind, [said(i)[0] for i in rows], dtype))
    drawn = dataset.read(rows, np.asarray([5, 2**63 + 1, 6, 2**64 - 1], np.uint64))
    captions = [said(49)[1], said(0)[0], said(7)[2], said(18)[(2**64 - 1) % 3]]
    assert_same({key: drawn[key] for key in kind.fields}, expected(kind, captions, dtype))
    np.testing.assert_array_equal(found["moments"], LatentDataset(dataset.directory).read(rows)["moments"])
    again = pickle.loads(pickle.dumps(dataset)).read(rows)
    assert_same(again, found)


def test_examples_are_spread_over_the_set(words, embedded):
    condition, captions = opened(words, BYTES).examples(5)
    assert captions == [said(i)[0] for i in (0, 10, 20, 30, 40)]
    assert_same(condition, expected(BYTES, captions))
    many, _ = opened(embedded, SD3).examples(120)
    assert len(many["mask"]) == 120
    labels, none = LatentDataset(words).examples(5)
    assert none == [] and labels["label"].shape == (5,)


# -------------------------------------------------------------------------------------- which caption


@pytest.mark.parametrize("kind", [BYTES, SD3], ids=["bytes", "sd3"])
def test_the_caption_of_a_step_hangs_on_nothing_but_seed_step_and_row(embedded, kind):
    dataset = opened(embedded, kind)
    wanted = {}
    for step in range(2, 6):
        rows, drawn = batch_indices(3, step, 16, COUNT), caption_words(3, step, 16).tolist()
        captions = [said(i)[word % len(said(i))] for i, word in zip(rows, drawn, strict=True)]
        wanted[step] = expected(kind, captions, ml_dtypes.bfloat16)
    for cache, devices in itertools.product(("none", "ram", "device"), (8, 1)):
        split = split_over(devices)
        with contextlib.closing(batches(dataset, 16, 3, 2, split, cache=cache)) as stream:
            for step, batch in zip(range(2, 6), stream, strict=False):
                assert_same({name: batch[name] for name in kind.fields}, wanted[step])
                assert all(array.sharding.is_equivalent_to(split, array.ndim) for array in batch.values())


def test_captions_are_drawn_evenly_and_anew():
    words = np.concatenate([caption_words(0, step, 100) for step in range(40)])
    counts = np.bincount((words % 4).astype(int))
    assert abs(counts - 1000).max() < 120
    assert len(np.unique(words)) == len(words)
    assert not np.array_equal(caption_words(0, 1, 8), caption_words(1, 1, 8))
    # Recorded: another NumPy or another machine must replay the same run.
    assert (caption_words(7, 2, 3) % 1000).tolist() == [355, 246, 650]


# ------------------------------------------------------------------------------------------- refused


def config_for(folder, text, classes=5):
    model = ModelConfig(input_size=(4, 4), in_channels=2, num_classes=classes)
    return Config(model=model, data=DataConfig(dir=str(folder)), text=text)


def test_a_set_of_both_trains_labels_or_captions(words, embedded):
    sd3 = TextConfig(encoder="sd3", length=LENGTH, channels=CHANNELS, clip_widths=(2, 3))
    assert open_dataset(config_for(words, TextConfig())).condition.fields.keys() == {"label"}
    for folder in (words, embedded):
        text = TextConfig(encoder="bytes", length=16)
        assert open_dataset(config_for(folder, text)).condition.fields.keys() == {"tokens"}
    assert open_dataset(config_for(embedded, sd3)).condition == dataclasses.replace(SD3, dropout=0.1)
    with pytest.raises(ConfigError, match=r"has captions that are not embedded; --text.encoder says sd3"):
        open_dataset(config_for(words, sd3))
    for change, message in (
        ({"length": 9}, "captions with length 8; --text.length says 9"),
        ({"channels": 7}, "captions with channels 6; --text.channels says 7"),
        ({"clip_widths": (1, 4)}, r"captions with clip_widths \(2, 3\); --text.clip-widths says \(1, 4\)"),
        ({"encoder": "some/model"}, "captions with encoder sd3; --text.encoder says some/model"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_dataset(config_for(embedded, dataclasses.replace(sd3, **change)))


def test_another_recipe_of_captions_is_refused(words, embedded, source, random_source, fake_encoder):
    for folder, options, message in (
        (words, {"embedder": embedder()}, "text encoder '', but this run has 'sd3'"),
        (embedded, {"embedder": embedder()}, "text dtype 'bfloat16', but this run has 'float16'"),
    ):
        with pytest.raises(DataError, match=message):
            made(source, fake_encoder(), folder, **options)
    plain = random_source(count=COUNT)
    with pytest.raises(DataError, match="text encoder '', but this run has None"):
        made(plain, fake_encoder(), words)


def test_memory_counts_the_captions(embedded, monkeypatch):
    from dit_jax.data import loader

    dataset = opened(embedded, SD3)
    m = dataset.metadata
    captions = (m.caption_tokens * CHANNELS + m.captions * POOLED) * 2
    room = COUNT * dataset.record_bytes + captions
    monkeypatch.setattr(loader, "_host", lambda: (1, room))
    check_memory(dataset, 1, "ram", workers=1)
    monkeypatch.setattr(loader, "_host", lambda: (1, room - 1))
    with pytest.raises(ConfigError, match=r"--data.cache is ram, which needs"):
        check_memory(dataset, 1, "ram", workers=1)
    sample = dataset.record_bytes + (LENGTH * CHANNELS + POOLED) * 2 + LENGTH
    monkeypatch.setattr(loader, "_host", lambda: (1, 3 * 16 * sample - 1))
    with pytest.raises(ConfigError, match=r"--train.batch-size is 16, of which 3 are in memory at once"):
        check_memory(dataset, 16, "none", workers=1)
    monkeypatch.setattr(loader, "_host", lambda: (1, 3 * 16 * sample))
    check_memory(dataset, 16, "none", workers=1)


def test_embeddings_beyond_their_type_are_refused(source, fake_encoder, tmp_path):
    class Large(FakeEncoder):
        def encode(self, captions):
            return [Embedded(part.tokens * 1e6, part.pooled) for part in super().encode(captions)]

    large = dataclasses.replace(embedder(), encoder=Large())
    with pytest.raises(DataError, match=r"a caption of 0 is not finite in float16; .* --text-dtype bfloat16"):
        made(source, fake_encoder(), tmp_path / "set", embedder=large)


def test_processes_and_workers_change_nothing(source, fake_encoder, embedded, tmp_path):
    options = {"embedder": embedder("bfloat16"), "process_count": 2}
    for index in (1, 0):
        made(source, fake_encoder(), tmp_path / "set", process_index=index, **options)
    for file in sorted(embedded.iterdir()):
        assert file.read_bytes() == (tmp_path / "set" / file.name).read_bytes(), file.name


# --------------------------------------------------------------------------------------- the command


def shapes(folder, count=5):
    """A folder of pictures, of the third two captions."""
    folder.mkdir()
    for i in range(count):
        image = np.random.default_rng(i).integers(0, 256, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat\ntwo" if i == 2 else f"dog {i}, left of a cat")
    return folder


@pytest.mark.slow
def test_the_command_embeds_inspects_and_goes_on(sd3_folder, tmp_path, monkeypatch, capsys):
    """Broken off in the middle; the same command finishes it, equal to the byte."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # the command adds to it
    options = [
        "--source", f"folder:{shapes(tmp_path / 'pictures')}", "--vae", "digits", "--image-size", "32",
        "--shard-size", "2", "--batch-size", "1", "--workers", "0", "--text-encoder", "sd3", str(sd3_folder),
        "--text-length", "85", "--text-dtype", "float16", "--no-mirrors",
    ]  # fmt: skip

    def prepared(name, code=0):
        assert prepare_command.main("prepare.py", ["--out", str(tmp_path / name), *options]) == code
        return tmp_path / name

    whole = prepared("whole")
    said = capsys.readouterr().out
    assert "captions: 6, 1.2 a record, embedded by sd3, weights" in said
    assert "85.0 of at most 85 tokens, 48 channels and 40 pooled, float16" in said
    encode, calls = Embedder.captions, []

    def failing(self, examples):
        calls.append(len(examples))
        if len(calls) == 4:
            raise DataError("power cut")
        return encode(self, examples)

    monkeypatch.setattr(Embedder, "captions", failing)
    prepared("broken", code=2)
    broken = prepared("broken")
    for file in sorted(whole.iterdir()):
        assert file.read_bytes() == (broken / file.name).read_bytes(), file.name
    condition = LatentDataset(whole).metadata.text.condition
    sd3 = open_encoder("sd3", 85, str(sd3_folder)).encode(["a cat"])[0]
    found = LatentDataset(whole, condition=condition).read([2])
    np.testing.assert_allclose(found["context"][0], sd3.tokens, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found["pooled"][0], sd3.pooled, rtol=2e-3, atol=2e-3)

    sheet = tmp_path / "sheet.png"
    capsys.readouterr()
    assert prepare_command.main("prepare.py", ["inspect", str(whole), "--out", str(sheet)]) == 0
    assert "every record is as the metadata says" in capsys.readouterr().out
    assert np.asarray(Image.open(sheet)).shape[2] == 3
    options[-1:] = ["--mirrors"]
    assert prepare_command.main("prepare.py", ["--out", str(whole), *options]) == 2
    assert "with mirrors False, but this run has True" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "digits", "--text-encoder", "sd3"], "--text-encoder is sd3, but digits/train has no captions"),
        (["--source", "digits-text", "--text-length", "3"], "--text-length is 3, but --text-encoder stores words"),
        (["--source", "digits-text", "--text-encoder", "a", "b", "c"], "--text-encoder is a b c; expected an"),
        (["--source", "digits-text", "--mirrors"], "a mirrored digit is none"),
        (["--source", "digits-text", "--captions", "none", "--text-encoder", "sd3"], "has no captions"),
        (["--source", "digits-text", "--text-encoder", "/nowhere"], "--text-encoder: the text encoder '/nowhere'"),
    ],
)  # fmt: skip
def test_options_that_contradict_are_one_sentence(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits_text, "TRAINING_PICTURES", 4)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    given = [
        "--out",
        str(tmp_path / "set"),
        "--vae",
        "digits",
        "--image-size",
        "72",
        "--no-mirrors",
        *options,
    ]
    assert prepare_command.main("prepare.py", given) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "set").exists()


def test_check_sees_captions_that_are_not_as_they_should_be(embedded, tmp_path, monkeypatch):
    inspection.check(LatentDataset(embedded))
    dataset = LatentDataset(embedded)
    for change in ({"captions": 3}, {"caption_tokens": 5}):
        dataset.metadata = dataclasses.replace(LatentDataset(embedded).metadata, **change)
        with pytest.raises(
            DataError, match=r"metadata.json counts .* captions of .* tokens, but its records"
        ):
            inspection.check(dataset)
    text = dataclasses.replace(dataset.metadata.text, channels=CHANNELS + 1)
    dataset.metadata = dataclasses.replace(dataset.metadata, text=text)
    with pytest.raises(DataError, match=r"record 0: a record has \d+ bytes of embeddings; expected"):
        inspection.check(dataset)
