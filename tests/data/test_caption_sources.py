"""Captions beside pictures: in text files, metadata files, tar files and TFDS datasets; and what is wrong there."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.decode import decode
from dit_jax.data.encode import prepare
from dit_jax.data.latents import LatentDataset
from dit_jax.data.metadata import DataError
from dit_jax.data.sources import open_source

QUOTED = 'She said "no",\nand left;\r\n\tthen came back, ça va?'


def png(seed=0, side=20):
    image = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(path, **files):
    """A folder of files by name; of text in UTF-8."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        target = path / name.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def captions(source):
    """Those of each record, or what is wrong with it."""
    examples = [decode(source, index, 16) for index in range(len(source))]
    return [example.problem or list(example.captions) for example in examples]


# -------------------------------------------------------------------------------------------- folders


def test_text_files_beside_pictures(tmp_path):
    path = folder_of(
        tmp_path / "set",
        **{
            "a.png": png(1), "a.txt": "a cat\n", "b.png": png(2), "b.txt": "one\n\n  two \r\nthree\n",
            "c.png": png(3), "c.txt": b"caf\xe9", "d.png": png(4), "d.txt": " \n", "e.png": png(5),
            "f.png": png(6), "f.txt": "x" * 10_000, "g.png": png(7), "g.txt": b"\xef\xbb\xbf\xc3\xbc",
        },
    )  # fmt: skip
    source = open_source(f"folder:{path}")
    assert captions(source) == [
        ["a cat"],
        ["one", "two", "three"],
        "its caption c.txt is no text that is UTF-8",
        "its caption is empty; expected words",
        "it has no caption; expected e.txt beside it",
        ["x" * 10_000],
        ["ü"],
    ]
    before = source.fingerprint()
    (path / "a.txt").write_text("a caterpillar")
    assert open_source(f"folder:{path}").fingerprint() != before
    plain = open_source(f"folder:{path}", captions=False)
    assert not plain.has_captions and captions(plain) == [[]] * 7


def test_labels_stay_beside_captions(tmp_path, fake_encoder):
    path = tmp_path / "set"
    for name in ("cats/1", "cats/2", "dogs/1"):
        folder_of(path, **{f"{name}.png".replace("/", "__"): png(), f"{name}.txt".replace("/", "__"): name})
    prepare(open_source(f"folder:{path}"), fake_encoder(), tmp_path / "out", image_size=16, batch_size=1)
    dataset = LatentDataset(tmp_path / "out")
    assert dataset.metadata.label_names == ("cats", "dogs")
    assert dataset.captions(range(3)) == [("cats/1",), ("cats/2",), ("dogs/1",)]
    assert dataset.read(range(3))["label"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_files_of_imagefolder(kind, tmp_path):
    rows = [("a.png", "one"), ("x/b.png", QUOTED), ("a.png", "two"), ("x/c.png", "")]
    path = folder_of(tmp_path / "set", **{"a.png": png(), "a.txt": "not this"})
    folder_of(path, **{"d.png": png(), "b.png": png(), "c.png": png()})
    rows = [(name.removeprefix("x/"), text) for name, text in rows]
    if kind == "jsonl":
        lines = [json.dumps({"text": text, "file_name": name}) for name, text in rows]
        (path / "metadata.jsonl").write_text("\n\n".join(lines) + "\n")
    else:
        with (path / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "file_name"), *((text, name) for name, text in rows)])
    source = open_source(f"folder:{path}")
    assert captions(source) == [
        ["one", "two"],
        [QUOTED],
        "its caption is empty; expected words",
        "it has no caption; expected a row of the metadata file for it",
    ]
    assert open_source(f"folder:{path}", caption_field="txt").captions(0) == ["not this"]
    with pytest.raises(DataError, match="--caption-field is title, but folder:set has no such captions"):
        open_source(f"folder:{path}", caption_field="title")


def test_metadata_may_lie_in_subfolders_and_hold_lists(tmp_path):
    path = folder_of(tmp_path / "set", **{"train__a.png": png(), "train__deep__b.png": png()})
    rows = [{"file_name": "a.png", "said": ["x", "y"]}, {"file_name": "deep/b.png", "said": "z"}]
    (path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert not open_source(f"folder:{path}").has_captions
    assert captions(open_source(f"folder:{path}", caption_field="said")) == [["x", "y"], ["z"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"text": "a"}', r"line 1 of .*metadata.jsonl has file_name None; expected the name"),
        ("metadata.jsonl", '\n{"file_name": "b.png", "text": "a"}', r"line 2 .* 'b.png', which is not there"),
        ("metadata.jsonl", '{"file_name": "../a.png", "text": "a"}', r"'../a.png', which is not there"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', r"text in line 1 .* is 3; expected a caption"),
        ("metadata.jsonl", '{"file_name": "a.png"', r"metadata.jsonl cannot be read \(Expecting"),
        ("metadata.jsonl", '["a"]', r"line 1 of .* is '\[\"a\"\]'; expected an object"),
        ("metadata.jsonl", b'{"text": "\xe9"}', r"metadata.jsonl cannot be read \('utf-8' codec"),
        ("metadata.csv", 'file_name,text\na.png,"cut', r"metadata.csv cannot be read \(unexpected end of data\)"),
        ("metadata.csv", "name,text\na.png,b", r"line 2 of .*metadata.csv has file_name None"),
        ("metadata.csv", "file_name,text\na.png", r"text in line 2 .* is null; expected a caption"),
    ],
)  # fmt: skip
def test_metadata_that_is_wrong_is_one_sentence(name, content, message, tmp_path):
    path = folder_of(tmp_path / "set", **{"a.png": png(), name: content})
    with pytest.raises(DataError, match=message):
        open_source(f"folder:{path}")


def test_missing_captions_are_bad_records(tmp_path, fake_encoder):
    path = folder_of(tmp_path / "set", **{"a.png": png(), "a.txt": "a", "b.png": png()})
    source, out = open_source(f"folder:{path}"), tmp_path / "out"
    with pytest.raises(
        DataError, match=r"b.png cannot be decoded: it has no caption; expected b.txt beside it"
    ):
        prepare(source, fake_encoder(), out, image_size=16, batch_size=1)
    metadata = prepare(source, fake_encoder(), out, image_size=16, batch_size=1, skip_bad=True)
    assert metadata.skipped == (("b.png", "it has no caption; expected b.txt beside it"),)
    assert (metadata.count, metadata.captions) == (1, 1)


# ----------------------------------------------------------------------------------------- tar files


MEMBERS = [
    ("0/k1.PNG", png(1)), ("0/k1.txt", "one\nline"), ("0/k1.json", json.dumps({"caption": "not this"})),
    ("0/k2.png", png(2)), ("0/k2.json", json.dumps({"caption": ["two", "zwei"], "title": "t"})),
    ("0/only_text.txt", "no picture"), ("0/k3.png", png(3)), ("0/k4.png", png(4)), ("0/k4.txt", b"\xff"),
    ("0/k5.png", png(5)), ("0/k5.json", "{"), ("0/k6.png", png(6)), ("0/k6.json", "[1]"),
]  # fmt: skip


def test_tar_shards_of_img2dataset(tmp_path, fake_encoder):
    tar_of(tmp_path / "s0.tar", MEMBERS)
    tar_of(tmp_path / "s1.tar", [("0/k1.png", png(9)), ("0/k1.txt", "in another shard")])
    for place in (tmp_path, tmp_path / "s?.tar"):
        source = open_source(f"tar:{place}")
        assert captions(source) == [
            ["one\nline"],
            ["two", "zwei"],
            "it has no caption; expected a .txt or a .json beside it",
            "its caption is no text that is UTF-8",
            "its .json cannot be read; expected an object in UTF-8",
            "it has no caption; expected text or caption or captions in its .json",
            ["in another shard"],
        ]
    assert [source.id(i) for i in (0, 6)] == ["s0.tar/0/k1", "s1.tar/0/k1"]
    np.testing.assert_array_equal(np.asarray(source.read(6)[0]), np.asarray(Image.open(io.BytesIO(png(9)))))
    titled = open_source(f"tar:{tmp_path / 's0.tar'}", caption_field="title")
    assert titled.captions(1) == ["t"] and "title in its .json" in captions(titled)[5]
    options = {"image_size": 16, "batch_size": 1, "skip_bad": True}
    prepare(source, fake_encoder(), tmp_path / "a", **options)
    prepare(source, fake_encoder(), tmp_path / "b", workers=1, **options)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert LatentDataset(tmp_path / "a").captions([2]) == [("in another shard",)]


def test_tar_shards_with_labels_or_with_pictures_alone(tmp_path):
    plain = open_source(f"tar:{tar_of(tmp_path / 'plain.tar', [('a.png', png()), ('b.png', png())])}")
    assert (len(plain), plain.has_captions, plain.num_classes, captions(plain)) == (2, False, 0, [[], []])
    labelled = [("a.png", png()), ("a.cls", "2"), ("b.png", png()), ("b.cls", "0\n"), ("b.txt", "b")]
    source = open_source(f"tar:{tar_of(tmp_path / 'labelled.tar', labelled)}")
    assert [source.read(i)[1] for i in (0, 1)] == [2, 0] and source.num_classes == 3
    assert (
        source.fingerprint() != open_source(f"tar:{tmp_path / 'labelled.tar'}", captions=False).fingerprint()
    )
    with pytest.raises(DataError, match=r"bad.tar/a.cls is b'x'; expected a class number"):
        open_source(f"tar:{tar_of(tmp_path / 'bad.tar', [('a.png', png()), ('a.cls', 'x')])}")


def test_tar_files_that_are_wrong_are_one_sentence(tmp_path):
    whole = tar_of(tmp_path / "whole.tar", [("a.png", png()), ("b.png", png(side=40))])
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        end = tar.getmembers()[1].offset_data
    cases = {
        "cut in a picture": (data[: end + 700], "expected a plain tar file, whole|is cut"),
        "cut in a header": (data[: end - 300], "is cut"),
        "cut between members": (data[: end - 512], "is cut"),
        "no tar": (b"hello" * 300, r"cannot be read .*; expected a plain tar file, whole"),
        "empty": (b"", "cannot be read"),
    }
    for number, (content, message) in enumerate(cases.values()):
        bad = tmp_path / f"bad{number}.tar"
        bad.write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_source(f"tar:{bad}")
    with tarfile.open(tmp_path / "small.tar", "w:gz") as tar:
        tar.add(whole)
    with pytest.raises(DataError, match=r"small.tar cannot be read .* plain tar"):
        open_source(f"tar:{tmp_path / 'small.tar'}")
    twice = tar_of(tmp_path / "twice.tar", [("a.png", png()), ("a.PNG", png())])
    with pytest.raises(DataError, match=r"twice.tar has two members of the name a.PNG; expected one"):
        open_source(f"tar:{twice}")
    with pytest.raises(DataError, match="holds no pictures"):
        open_source(f"tar:{tar_of(tmp_path / 'text.tar', [('a.txt', 'a')])}")
    with pytest.raises(DataError, match="names no tar file; expected one, a folder"):
        open_source(f"tar:{tmp_path / 'no*.tar'}")


# ----------------------------------------------------------------------------------------------- TFDS


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A tiny TFDS dataset with a caption, and several in a sequence of features as coco_captions has them."""
    import tensorflow_datasets as tfds

    class Said(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            text = tfds.features.Text()
            features = {
                "image": tfds.features.Image(encoding_format="png"), "title": text,
                "captions": tfds.features.Sequence({"id": np.int64, "text": text}),
                "lines": tfds.features.Sequence(text),
            }  # fmt: skip
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                said = [{"id": k, "text": f"é{i}.{k}"} for k in range(i)]
                yield i, {
                    "image": io.BytesIO(png(i)), "title": f"t{i}", "captions": said,
                    "lines": [part["text"] for part in said],
                }  # fmt: skip

    builder = Said(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_caption_fields_of_tfds(tfds_folder):
    name = f"tfds:{tfds_folder}"
    assert not open_source(name).has_captions
    titles = captions(open_source(name, caption_field="title"))
    assert sorted(titles) == [["t0"], ["t1"], ["t2"], ["t3"]]
    for field in ("captions/text", "lines"):
        for title, found in zip(titles, captions(open_source(name, caption_field=field)), strict=True):
            i = int(title[0][1])
            wanted = [f"é{i}.{k}" for k in range(i)]
            assert found == (wanted or "it has no caption; expected at least one")
    for field, message in (
        ("caption", "--caption-field is caption; .* has there .*title"),
        ("captions", "--caption-field is captions, which in .* is no text"),
        ("captions/id", "is no text; expected a feature of text"),
        ("title/text", "has there no features of its own"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(name, caption_field=field)


def test_a_source_without_captions_has_no_field(tmp_path):
    with pytest.raises(DataError, match="--caption-field is text, but digits/train has no such captions"):
        open_source("digits", caption_field="text")
