"""Datasets in buckets: prepared there, from pictures there, to the byte as on a disk."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from dit_jax import paths
from dit_jax.data import inspection, shard_cache
from dit_jax.data.encode import prepare
from dit_jax.data.folders import FolderSource
from dit_jax.data.latents import LatentDataset
from dit_jax.data.metadata import DataError
from dit_jax.data.sources import ArraySource, open_source

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def encoder():
    """Latents (B, 8, 8, 4) from pictures (B, 16, 16, 3)."""
    import jax
    import jax.numpy as jnp

    from dit_jax.data.encoders import Encoder, compile_encode

    def encode(scale, images):
        mean = scale * images[..., 0].reshape(-1, 8, 2, 8, 2).swapaxes(2, 3).reshape(-1, 8, 8, 4)
        return mean, 0.1 + 0.01 * jnp.abs(mean)

    return Encoder(
        vae="fake", vae_hash="f" * 64, backend="flax", precision="float32", scaling_factor=0.5, shift_factor=0.1,
        factor=2, channels=4, devices=jax.local_device_count(), compile=compile_encode(encode, jnp.float32(2.0)),
    )  # fmt: skip


def pictures(n=40):
    rng = np.random.default_rng(0)
    return ArraySource(
        "random", rng.integers(0, 256, (n, 16, 16, 3), np.uint8), rng.integers(0, 4, n), tuple("abcd")
    )


OPTIONS = {"image_size": 16, "shard_size": 16, "batch_size": 8}


def test_a_dataset_in_a_bucket_is_that_of_a_disk(store, encoder, tmp_path, monkeypatch, capsys):
    import bucket_server

    monkeypatch.setattr(shard_cache, "cache_folder", lambda: tmp_path / "cache")
    out = f"{store.bucket()}/set"
    prepare(pictures(), encoder, tmp_path / "set", **OPTIONS)
    # The store refuses in the middle: the same command goes on from what is there.
    second = lambda method, path: bucket_server.writes(method, path) and "00001-of" in path  # noqa: E731
    with store.failing(second, status=403), pytest.raises(DataError, match=r"where a file cannot be written"):
        prepare(pictures(), encoder, out, **OPTIONS)
    assert sum("array_record" in name for name in paths.names_in(paths.to_path(out))) == 1
    store.requests.clear()
    prepare(pictures(), encoder, out, **OPTIONS)
    assert not any(
        bucket_server.writes(method, path) and "00000-of" in path for method, path in store.requests
    )
    here, there = (
        {name: paths.read_bytes(file) for name, file in paths.files_below(paths.to_path(folder)).items()}
        for folder in (tmp_path / "set", out)
    )
    unlike = {
        name for name in here | there if here.get(name) != there.get(name) and ".unfinished" not in name
    }
    assert unlike <= {"dataset_info.json"}  # it says where it was written
    rows = np.array([39, 0, 17, 3])
    for mine, theirs in zip(
        *(LatentDataset(folder).read(rows).values() for folder in (tmp_path / "set", out)), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    inspection.check(LatentDataset(out))
    copied = (tmp_path / "cache").exists()
    assert copied == (store.scheme == "s3") == ("are copied to" in capsys.readouterr().err)
    with pytest.raises(DataError, match=r"holds a finished dataset with shard_size 16, but this run has 20"):
        prepare(pictures(), encoder, out, **OPTIONS | {"shard_size": 20})


def test_a_shard_that_is_cut_or_gone_is_named(google, encoder):
    out = paths.to_path(f"{google.bucket()}/set")
    prepare(pictures(), encoder, out, **OPTIONS)
    shard = LatentDataset(out).shard(1)
    whole = paths.read_bytes(shard)
    shard.write_bytes(whole[:-1])
    with pytest.raises(
        DataError, match=rf"{shard.name} has {len(whole) - 1} bytes; metadata.json says {len(whole)}"
    ):
        LatentDataset(out)
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name} has no file bytes; metadata.json says"):
        LatentDataset(out)
    with pytest.raises(DataError, match=r"gs://.*/nothing does not exist \(no metadata.json\)"):
        LatentDataset(f"{out.parent}/nothing")


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def test_pictures_with_captions_in_a_bucket(google, tmp_path):
    files = {
        "a/1.png": png(10),
        "a/1.txt": b"one",
        "b/2.png": png(20),
        "b/2.txt": b"two\ntoo",
        "b/[3]*?#%20.png": png(40),
        "b/[3]*?#%20.txt": b"three",
        "b/.3.png": png(30),
    }
    there = paths.to_path(f"{google.bucket()}/pictures")
    for name, data in files.items():
        (there / name).write_bytes(data)
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(data)
    mine, theirs = FolderSource(tmp_path / "pictures", ""), FolderSource(there, "")
    assert mine.fingerprint() == theirs.fingerprint() and theirs.label_names == ("a", "b")
    assert theirs.files == ["a/1.png", "b/2.png", "b/[3]*?#%20.png"]
    assert theirs.captions(1) == ["two", "too"] and theirs.captions(2) == ["three"]
    assert [theirs.read(i)[0].getpixel((0, 0))[0] for i in range(3)] == [10, 20, 40]
    (there / "metadata.jsonl").write_text('{"file_name": "a/1.png", "text": "of a table"}\n')
    assert FolderSource(there, "").captions(0) == ("of a table",)
    with pytest.raises(DataError, match=r"folder:gs://.*/nothing is not a folder"):
        open_source(f"folder:{there.parent}/nothing")


def test_tar_shards_and_arrays_in_a_bucket(google):
    there = paths.to_path(f"{google.bucket()}/shards")
    for number in range(2):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in (
                (f"{number}.png", png(number)),
                (f"{number}.txt", f"caption {number}".encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        (there / f"{number}.tar").write_bytes(buffer.getvalue())
    for name in (f"tar:{there}", f"tar:{there}/*.tar"):
        source = open_source(name)
        assert len(source) == 2 and source.captions(1) == ["caption 1"]
        assert source.read(1)[0].getpixel((0, 0)) == (1, 1, 1)
    buffer = io.BytesIO()
    np.savez(buffer, images=pictures(3).images)
    (there / "some.npz").write_bytes(buffer.getvalue())
    assert len(open_source(f"npz:{there}/some.npz")) == 3
