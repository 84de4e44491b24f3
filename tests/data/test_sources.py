"""Sources of every kind, with the files that real folders hold; the crop."""

import dataclasses
import errno
import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from dit_jax.data.crop import center_crop
from dit_jax.data.decode import decode
from dit_jax.data.encode import prepare
from dit_jax.data.latents import LatentDataset
from dit_jax.data.metadata import DataError, load_metadata
from dit_jax.data.sources import BadImageError, decode_rgb, open_source


def picture(height=40, width=60, seed=0):
    """A smooth random picture, so that JPEG keeps it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "png"} | options))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, with one of each kind of file."""
    root = tmp_path_factory.mktemp("pictures")
    red, blue = root / "red", root / "blue"
    (blue / "deep").mkdir(parents=True)
    red.mkdir()
    (root / "notes").mkdir()
    (root / ".cache").mkdir()
    (root / "notes" / "readme.txt").write_text("no picture")
    (root / ".cache" / "hidden.png").write_bytes(encoded(picture()))
    (red / ".hidden.png").write_bytes(encoded(picture()))
    (red / "labels.csv").write_text("a,b")
    (red / "color.png").write_bytes(encoded(picture()))
    (red / "photo.JPEG").write_bytes(encoded(picture(), format="jpeg", quality=95))
    (red / "gray.png").write_bytes(encoded(picture().convert("L")))
    (red / "pixel.png").write_bytes(encoded(Image.new("RGB", (1, 1), (9, 99, 199))))
    (blue / "cmyk.jpg").write_bytes(encoded(picture().convert("CMYK"), format="jpeg", quality=95))
    (blue / "deep" / "sixteen.png").write_bytes(
        encoded(Image.fromarray(np.full((20, 30), 257 * 100, np.uint16)))
    )
    (blue / "transparent.png").write_bytes(encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 0))))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    (blue / "turned.jpg").write_bytes(encoded(picture(), format="jpeg", quality=95, exif=exif))
    return root


@pytest.fixture(scope="module")
def bad_folder(folder, tmp_path_factory):
    """The same with two files that cannot be decoded."""
    root = tmp_path_factory.mktemp("bad") / "pictures"
    shutil.copytree(folder, root)
    (root / "blue" / "broken.jpg").write_bytes(encoded(picture(), format="jpeg")[:300])
    (root / "red" / "page.png").write_text("<html>not found</html>")
    return root


FILES = [
    "blue/cmyk.jpg", "blue/deep/sixteen.png", "blue/transparent.png", "blue/turned.jpg",
    "red/color.png", "red/gray.png", "red/photo.JPEG", "red/pixel.png",
]  # fmt: skip


# -------------------------------------------------------------------------------------------- folder


def test_a_folder_lists_pictures_by_class(folder):
    source = open_source(f"folder:{folder}")
    assert [source.id(i) for i in range(len(source))] == FILES
    assert source.label_names == ("blue", "red")
    assert source.num_classes == 2
    assert [source.read(i)[1] for i in range(len(source))] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert source.name == f"folder:{folder.name}"


def test_every_kind_of_picture_becomes_upright_rgb(folder):
    source = open_source(f"folder:{folder}")
    images = {file: np.asarray(source.read(i)[0]).astype(int) for i, file in enumerate(FILES)}
    original = np.asarray(picture()).astype(int)
    np.testing.assert_array_equal(images["red/color.png"], original)
    assert np.abs(images["red/photo.JPEG"] - original).mean() < 4
    gray = np.asarray(picture().convert("L")).astype(int)
    np.testing.assert_array_equal(images["red/gray.png"], np.repeat(gray[..., None], 3, -1))
    np.testing.assert_array_equal(images["red/pixel.png"], [[[9, 99, 199]]])
    assert np.abs(images["blue/cmyk.jpg"] - original).mean() < 6
    np.testing.assert_array_equal(images["blue/deep/sixteen.png"], np.full((20, 30, 3), 100))
    np.testing.assert_array_equal(images["blue/transparent.png"], np.full((20, 20, 3), 255))
    assert images["blue/turned.jpg"].shape == (60, 40, 3)
    assert np.abs(np.rot90(images["blue/turned.jpg"]) - original).mean() < 4


def test_a_folder_without_subfolders_is_unlabelled(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(seed=i)))
    source = open_source(f"folder:{tmp_path}")
    assert (len(source), source.num_classes, source.label_names) == (3, 0, ())
    assert source.read(2)[1] == 0


def test_the_fingerprint_sees_another_file(folder, bad_folder):
    assert open_source(f"folder:{folder}").fingerprint() != open_source(f"folder:{bad_folder}").fingerprint()


def test_folders_that_are_unclear_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no pictures; expected files ending in \.bmp"):
        open_source(f"folder:{tmp_path}")
    with pytest.raises(DataError, match="is not a folder"):
        open_source(f"folder:{tmp_path}/none")
    (tmp_path / "a").mkdir()
    for file in ("a/1.png", "loose.png"):
        (tmp_path / file).write_bytes(encoded(picture()))
    with pytest.raises(DataError, match=r"pictures in subfolders and 1 beside them, such as loose.png"):
        open_source(f"folder:{tmp_path}")


def test_names_that_are_no_text_are_kept_readable(fake_encoder, tmp_path):
    names = [b"caf\xe9", "日本".encode()]
    for name in names:
        try:
            os.makedirs(os.fsencode(tmp_path) + b"/pictures/" + name)
        except OSError:
            pytest.skip("needs a file system on which a name may be any bytes")
        for file, data in ((b"x\xff.png", encoded(picture())), (b"bad\xff.png", b"")):
            with open(os.path.join(os.fsencode(tmp_path), b"pictures", name, file), "wb") as out:
                out.write(data)
    source = open_source(f"folder:{tmp_path}/pictures")
    prepare(source, fake_encoder(), tmp_path / "set", image_size=16, batch_size=1, skip_bad=True)
    dataset = LatentDataset(tmp_path / "set")
    assert dataset.metadata.label_names == (r"caf\xe9", "日本")
    assert dataset.ids(range(2)) == [r"caf\xe9/x\xff.png", r"日本/x\xff.png"]
    assert [name for name, _ in dataset.metadata.skipped] == [r"caf\xe9/bad\xff.png", r"日本/bad\xff.png"]


def test_links_that_lead_nowhere_or_in_circles_are_named(folder, fake_encoder, tmp_path):
    shutil.copytree(folder, tmp_path / "pictures")
    (tmp_path / "pictures" / "again").symlink_to("red")  # another class of the same pictures
    assert len(open_source(f"folder:{tmp_path}/pictures")) == len(FILES) + 4
    dead = tmp_path / "pictures" / "red" / "dead.png"
    dead.symlink_to("gone.png")
    source = open_source(f"folder:{tmp_path}/pictures")
    with pytest.raises(DataError, match=r"dead\.png cannot be read: No such file"):
        prepare(source, fake_encoder(), tmp_path / "set", image_size=16, batch_size=1)
    dead.unlink()
    (tmp_path / "pictures" / "red" / "up").symlink_to("..")
    with pytest.raises(DataError, match="/up is a link to a folder that it lies in"):
        open_source(f"folder:{tmp_path}/pictures")


def test_pipes_and_devices_are_refused_where_reading_would_never_end(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pictures")
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        odd = tmp_path / "pictures" / "red" / "odd.png"
        make(odd)
        with pytest.raises(DataError, match=r"red/odd\.png is a pipe or a device.*; expected a picture"):
            open_source(f"folder:{tmp_path}/pictures").fingerprint()
        odd.unlink()
    os.mkfifo(tmp_path / "set.npz")
    with pytest.raises(DataError, match=r"set\.npz is a folder, a pipe or a device; expected a file"):
        open_source(f"npz:{tmp_path}/set.npz")


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    def scandir(path):
        if str(path).endswith("red"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return list_folder(path)

    list_folder = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="red cannot be read: Permission denied"):
        open_source(f"folder:{folder}")


def test_a_picture_that_cannot_be_decoded_is_named(bad_folder, fake_encoder, tmp_path):
    source = open_source(f"folder:{bad_folder}")
    with pytest.raises(
        DataError, match=r"blue/broken.jpg cannot be decoded: OSError: .*runcated.*pass --skip-bad"
    ):
        prepare(source, fake_encoder(), tmp_path / "set", image_size=16, batch_size=1)


def test_skip_bad_leaves_them_out_and_lists_them(folder, bad_folder, fake_encoder, tmp_path):
    options = {"image_size": 16, "batch_size": 1, "shard_size": 3}
    for root, out in ((folder, "good"), (bad_folder, "skipped")):
        prepare(open_source(f"folder:{root}"), fake_encoder(), tmp_path / out, skip_bad=True, **options)
    good, skipped = LatentDataset(tmp_path / "good"), LatentDataset(tmp_path / "skipped")
    assert [name for name, _ in skipped.metadata.skipped] == ["blue/broken.jpg", "red/page.png"]
    assert all(reason for _, reason in skipped.metadata.skipped)
    assert (skipped.metadata.count, skipped.metadata.source_count) == (8, 10)
    assert skipped.ids(range(8)) == FILES
    np.testing.assert_array_equal(skipped.read(range(8))["moments"], good.read(range(8))["moments"])
    np.testing.assert_array_equal(skipped.read(range(8))["label"], [0, 0, 0, 0, 1, 1, 1, 1])


def test_reasons_do_not_differ_between_runs(bad_folder):
    source = open_source(f"folder:{bad_folder}")
    index = [source.id(i) for i in range(len(source))].index("red/page.png")
    assert "0x" not in decode(source, index, 8).problem


def test_an_unreadable_disk_is_not_a_bad_picture(folder):
    source = open_source(f"folder:{folder}")
    source.files = ["gone.png"]
    with pytest.raises(DataError, match=r"gone.png cannot be read: No such file"):
        decode(source, 0, 8)


def test_float_pixels_are_refused():
    image = Image.fromarray(np.zeros((4, 4), np.float32))
    with pytest.raises(BadImageError, match="floating-point"):
        decode_rgb(encoded(image, format="tiff"))


# ----------------------------------------------------------------------------------------------- npz


def test_an_npz_gives_images_and_labels(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 8, 6, 3), dtype=np.uint8), np.array([0, 2, 1, 2, 0])
    np.savez(tmp_path / "set.npz", images=images, labels=labels, label_names=["a", "b", "c"])
    source = open_source(f"npz:{tmp_path}/set.npz")
    assert (len(source), source.num_classes, source.label_names) == (5, 3, ("a", "b", "c"))
    image, label = source.read(3)
    np.testing.assert_array_equal(image, images[3])
    assert (label, source.id(3), source.name) == (2, "3", "npz:set.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "has the arrays x; expected images"),
        ({"images": np.zeros((2, 4, 4, 3))}, "type float64; expected .N, H, W, 3."),
        ({"images": np.zeros((2, 4, 4, 4), np.uint8)}, r"shape \(2, 4, 4, 4\)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, r"labels have shape \(3,\)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "integers from 0 on"),
        (
            {"images": np.zeros((1, 4, 4), np.uint8), "labels": np.array([1]), "label_names": ["a"]},
            "1 label_names do not cover",
        ),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 2**63 + 5], np.uint64)},
            r"labels reach 9223372036854775813; expected class numbers from 0 to 2147483646",
        ),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 2**40])},
            r"labels reach 1099511627776; expected class numbers from 0 to 2147483646",
        ),
        (
            {
                "images": np.zeros((2, 4, 4), np.uint8),
                "labels": np.arange(2),
                "label_names": ["a", "b", "a"],
            },
            "has 2 classes of the name 'a'; expected another name for each class",
        ),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, r"shape \(0, 4, 4\)"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.ones(2, int), "label_names": "a"},
            "1 label_names do not cover",
        ),
    ],
)
def test_an_npz_of_another_shape_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_source(f"npz:{tmp_path}/set.npz")


@pytest.mark.parametrize("content", ["nothing", "text", "half", "one array"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    file = tmp_path / "set.npz"
    np.savez(file, images=np.zeros((3, 8, 8, 3), np.uint8))
    if content == "one array":
        with file.open("wb") as out:
            np.save(out, np.zeros((3, 8, 8, 3), np.uint8))
    else:
        file.write_bytes({"nothing": b"", "text": b"hello", "half": file.read_bytes()[:300]}[content])
    with pytest.raises(DataError, match=r"set\.npz cannot be read: File is not a zip file"):
        open_source(f"npz:{file}")


# ---------------------------------------------------------------------------------------------- TFDS


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A tiny TFDS dataset of seven PNGs in two classes."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # TFDS would look for a package around this file

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(7):
                yield i, {"image": io.BytesIO(encoded(picture(20 + i, 30, seed=i))), "label": i % 2}

    builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_a_tfds_dataset_is_read_without_tensorflow(tfds_folder, fake_encoder, tmp_path):
    import sys

    source = open_source(f"tfds:{tfds_folder}")
    assert (len(source), source.label_names, source.name) == (7, ("cat", "dog"), "tfds:tiny/1.0.0/train")
    found = {image.height: (np.asarray(image), label) for image, label in map(source.read, range(7))}
    for i in range(7):
        np.testing.assert_array_equal(found[20 + i][0], picture(20 + i, 30, seed=i))
        assert found[20 + i][1] == i % 2
    prepare(source, fake_encoder(), tmp_path / "set", image_size=16, batch_size=1, workers=1)
    assert LatentDataset(tmp_path / "set").ids([6]) == ["tfds:tiny/1.0.0/train/6"]
    assert "tensorflow" not in sys.modules


def test_tfds_datasets_that_are_not_there_are_refused(tfds_folder, tmp_path):
    with pytest.raises(DataError, match=r"--split is test; .* has the splits train"):
        open_source(f"tfds:{tfds_folder}", split="test")
    with pytest.raises(DataError, match="neither a TFDS dataset nor a folder"):
        open_source("tfds:no_such_dataset")
    with pytest.raises(DataError, match="run tfds build mnist --file_format=array_record"):
        open_source("tfds:mnist", tfds_data_dir=str(tmp_path))


def test_unknown_sources_are_refused():
    with pytest.raises(DataError, match="--source is 'ftp:x'; expected digits, folder:PATH"):
        open_source("ftp:x")


# ---------------------------------------------------------------------------------------------- crop


@pytest.mark.parametrize("size", [(60, 40), (33, 100), (513, 1030), (64, 64), (1, 1), (7, 300)])
def test_crop_is_that_of_adm(size):
    """Against the description, step by step, in the order of the paper's code: halve, bicubic, cut."""
    width, height = size
    image = picture(height, width, seed=width)
    step = image
    while min(step.size) >= 64:
        step = step.resize((step.width // 2, step.height // 2), Image.Resampling.BOX)
    scale = 32 / min(step.size)
    step = step.resize(tuple(round(x * scale) for x in step.size), Image.Resampling.BICUBIC)
    top, left = (step.height - 32) // 2, (step.width - 32) // 2
    expected = np.asarray(step)[top : top + 32, left : left + 32]
    found = center_crop(image, 32)
    assert found.shape == (32, 32, 3)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_a_crop_of_an_extreme_shape_needs_little_memory():
    assert center_crop(Image.new("RGB", (1, 50_000)), 256).shape == (256, 256, 3)


def test_recipe_holds_no_path(folder, fake_encoder, tmp_path):
    metadata = prepare(open_source(f"folder:{folder}"), fake_encoder(), tmp_path / "set", image_size=16)
    assert str(folder.parent) not in str(dataclasses.asdict(metadata))


@pytest.mark.parametrize(
    "open_it", [load_metadata, lambda n: open_source(f"folder:{n}"), lambda n: open_source(f"npz:{n}")]
)
def test_a_name_that_no_file_system_takes_is_refused(open_it):
    with pytest.raises(DataError):
        open_it("x" * 3000)
