"""The command: killed, shared by processes, inspected; and the moments against diffusers' own class."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dit_jax.commands import prepare as prepare_command
from dit_jax.data import inspection
from dit_jax.data.encode import UNFINISHED, prepare
from dit_jax.data.encoders import diffusers_encoder, flax_encoder
from dit_jax.data.latents import LatentDataset
from dit_jax.data.metadata import DataError, load_metadata

ROOT = pathlib.Path(__file__).parents[2]
SHARDS = 30
STARTED: list[subprocess.Popen] = []


def command(*args, devices=2, cache=None):
    """prepare.py in a process of its own, with so many virtual devices; only the first compiles.

    cache: the user's folder for caches, if programs are to be kept there and not in that of the tests.
    """
    env = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if cache:
        del env["JAX_COMPILATION_CACHE_DIR"]
        env["XDG_CACHE_HOME"] = str(cache)
    process = subprocess.Popen(
        [sys.executable, ROOT / "prepare.py", *map(str, args)],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def _nothing_left_running():
    """Ends what a failing test has left."""
    yield
    while STARTED:
        with STARTED.pop() as process:
            process.kill()


def finished(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("npz") / "images.npz"
    images = rng.integers(0, 256, (SHARDS * 16 - 5, 40, 32, 3), dtype=np.uint8)
    np.savez(file, images=images, labels=rng.integers(0, 3, len(images)), label_names=["x", "y", "z"])
    return file


@pytest.fixture(scope="module")
def options(npz):
    return (
        "--source", f"npz:{npz}", "--vae", "digits", "--image-size", 32,
        "--shard-size", 16, "--batch-size", 1, "--workers", 1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(options, tmp_path_factory):
    """The dataset of one undisturbed process."""
    out = tmp_path_factory.mktemp("reference") / "set"
    output = finished(command("--out", out, *options))
    assert "images/s" in output
    assert "done" in output
    return out


@pytest.mark.slow
def test_killed_while_writing_then_resumed_is_equal_to_the_byte(options, reference, tmp_path):
    out = tmp_path / "set"
    process = command("--out", out, *options)
    while len(list(out.glob("latents-*"))) < 4:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = {path: path.stat().st_mtime_ns for path in out.glob("latents-*")}
    assert 4 <= len(written) < SHARDS
    for path in written:  # what is visible is whole
        assert path.read_bytes() == (reference / path.name).read_bytes()
    with pytest.raises(DataError, match="holds no finished latent dataset"):
        LatentDataset(out)

    finished(command("--out", out, *options))
    assert contents(out) == contents(reference)
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())  # not written again


@pytest.mark.slow
def test_two_processes_at_once_are_equal_to_one(options, reference, tmp_path):
    """Nor does the number of devices matter: one each, where the reference had two."""
    out = tmp_path / "set"
    share = [
        command("--out", out, *options, "--process-index", i, "--process-count", 2, devices=1)
        for i in range(2)
    ]
    outputs = list(map(finished, share))
    assert any("done" in output for output in outputs)
    assert contents(out) == contents(reference)


@pytest.mark.slow
def test_the_same_command_at_once_takes_turns_and_outlives_a_killed_one(options, reference, tmp_path):
    """The first is halted while it holds its shards, two more start, the first is killed: one goes on, one waits."""
    out = tmp_path / "set"
    first = command("--out", out, *options)
    while not list(out.glob("latents-*")):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    written = {path: path.stat().st_mtime_ns for path in out.glob("latents-*")}
    assert len(written) < SHARDS
    others = [command("--out", out, *options) for _ in range(2)]
    for other in others:
        said = next((line for line in other.stdout if "waiting for another process" in line), "")
        assert str(out) in said
    first.kill()
    first.communicate()
    for other in others:
        assert "done" in finished(other)
    assert contents(out) == contents(reference)
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(options, reference, small_disk):
    folder, resize = small_disk
    out = folder / "set"
    process = command("--out", out, *options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    said = output.strip().splitlines()[-1]
    assert said.startswith(f"prepare.py: --out, the dataset's folder, is '{out}'")
    assert "No space left on device" in said
    written = {path: path.stat().st_mtime_ns for path in out.glob("latents-*")}
    assert 1 <= len(written) < SHARDS
    for path in written:
        assert path.read_bytes() == (reference / path.name).read_bytes()
    assert not list((out / UNFINISHED).glob("shard-*-*"))  # what was being written
    assert not list((out / UNFINISHED).glob(".*"))

    resize("8m")
    finished(command("--out", out, *options))
    assert contents(out) == contents(reference)
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())


@pytest.mark.slow
def test_a_bad_option_is_one_sentence_and_exit_code_two(tmp_path):
    process = command("--source", "folder:/no/such", "--out", tmp_path / "set", "--vae", "digits")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.strip().splitlines()[-1].startswith("prepare.py: folder:/no/such is not a folder")
    assert not (tmp_path / "set").exists()


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_command, "prepare", interrupted)
    assert prepare_command.main("prepare.py", ["--source", "digits", "--out", "nowhere"]) == 130
    assert capsys.readouterr().err == "prepare.py: interrupted; the same command goes on\n"


def test_a_sheet_of_no_samples_is_refused(monkeypatch, capsys):
    assert prepare_command.main("prepare.py", ["inspect", "nowhere", "--count", "0"]) == 2
    assert capsys.readouterr().err == "prepare.py: --count is 0; expected 1 or more\n"


def test_programs_are_kept_for_the_next_command(monkeypatch, capsys):
    kept = []
    monkeypatch.setattr("dit_jax.compiler.keep_compiled_programs", lambda: kept.append(True))
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # the command adds to it
    for args in (["--source", "ftp:x", "--out", "nowhere"], ["inspect", "nowhere"]):
        assert prepare_command.main("prepare.py", args) == 2
    assert kept == [True, True]


@pytest.mark.slow
def test_inspect_prints_checks_and_draws(reference, tmp_path):
    sheet = tmp_path / "sheet.png"
    output = finished(command("inspect", reference, "--out", sheet, "--count", 6, cache=tmp_path / "cache"))
    assert list((tmp_path / "cache").rglob("jit_decode-*"))  # the next one need not compile it
    for expected in (
        "npz:images.npz",
        "475 records in 30 shards",
        "3 (x, y, z)",
        "every record is as the metadata says",
    ):
        assert expected in output
    with Image.open(sheet) as image:
        assert image.mode == "RGB"
        assert min(image.size) >= 64


# ----------------------------------------------------------------------------------------- inspection


@pytest.fixture
def small_set(random_source, fake_encoder, tmp_path):
    """A fresh dataset that a test may damage."""
    prepare(
        random_source(count=20), fake_encoder(), tmp_path / "set", image_size=16, shard_size=8, batch_size=1
    )
    return tmp_path / "set"


def rewrite(folder, **changes):
    """Change facts of the metadata."""
    import dataclasses

    changed = dataclasses.replace(load_metadata(folder), **changes)
    (folder / "metadata.json").write_text(changed.to_json())


def test_check_accepts_a_good_dataset_after_it_has_read_every_record(small_set, monkeypatch):
    dataset, asked = LatentDataset(small_set), []
    read = dataset.read
    monkeypatch.setattr(inspection, "CHUNK", 8)
    monkeypatch.setattr(dataset, "read", lambda rows: asked.extend(rows.tolist()) or read(rows))
    inspection.check(dataset)
    assert sorted(asked) == list(range(20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 3}, r"record \d+ has a label outside 0..2"),
        ({"latent_mean": (0.0, 9.0)}, "latent_mean of the records is"),
        ({"latent_std": (1.0, 9.0)}, "latent_std of the records is"),
        ({"count": 21}, "counts 21 records, but its shards 20"),
        ({"latent_shape": (4, 4, 3)}, "record 0 of .* has 256 bytes of moments; expected 384"),
    ],
)
def test_check_finds_contradictions(small_set, changes, message):
    rewrite(small_set, **changes)
    with pytest.raises(DataError, match=message):
        inspection.check(LatentDataset(small_set))


def test_check_finds_a_flipped_bit(small_set):
    shard = sorted(small_set.glob("latents-*"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="00001-of-00003 has another checksum"):
        inspection.check(LatentDataset(small_set))


@pytest.mark.slow
def test_a_sheet_on_a_full_disk_is_one_sentence(reference, small_disk):
    folder, resize = small_disk
    resize("20k")
    with pytest.raises(DataError, match=r"--out is '.*x\.png', which cannot be written: .*No space left"):
        inspection.sample_sheet(LatentDataset(reference), folder / "x.png", vae="digits")
    assert list(folder.iterdir()) == []


def test_a_sheet_needs_the_datasets_own_autoencoder(small_set, tmp_path):
    with pytest.raises(DataError, match="digits is not the autoencoder of this dataset"):
        inspection.sample_sheet(LatentDataset(small_set), tmp_path / "x.png", vae="digits")
    with pytest.raises(DataError, match="--vae names the place"):
        inspection.sample_sheet(LatentDataset(small_set), tmp_path / "x.png")


# ------------------------------------------------------------------------------------------ diffusers


@pytest.fixture(scope="module")
def random_vae(tmp_path_factory):
    """A small AutoencoderKL with random weights, written by diffusers."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers and torch (the interop extra)")
    torch = pytest.importorskip("torch", reason="needs diffusers and torch (the interop extra)")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[16, 32], norm_num_groups=8, latent_channels=4, scaling_factor=0.3, shift_factor=0.1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_stored_moments_are_those_of_diffusers_own_class(random_vae, random_source, tmp_path):
    """Both backends on the same images: moments to 1e-3 in float16, and so the statistics of the metadata."""
    source, options = random_source(count=12, size=32), {"image_size": 32, "batch_size": 1, "workers": 0}
    ours = prepare(source, flax_encoder(random_vae), tmp_path / "flax", **options)
    peer = prepare(source, diffusers_encoder(random_vae), tmp_path / "diffusers", **options)
    found, expected = (
        LatentDataset(tmp_path / name).read(range(12))["moments"].astype(np.float32)
        for name in ("flax", "diffusers")
    )
    assert expected.std() > 0.05  # not a comparison of zeros
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(ours.latent_mean, peer.latent_mean, atol=1e-3)
    np.testing.assert_allclose(ours.latent_std, peer.latent_std, rtol=1e-3)
    assert (ours.vae_backend, peer.vae_backend) == ("flax", "diffusers")
    assert (ours.scaling_factor, ours.shift_factor) == (peer.scaling_factor, peer.shift_factor) == (0.3, 0.1)
    assert ours.vae_hash == peer.vae_hash


def test_the_mirror_is_the_encoding_of_the_mirrored_image(random_vae, random_source, tmp_path):
    source = random_source(count=3, size=16)
    prepare(source, flax_encoder(random_vae), tmp_path / "set", image_size=16, batch_size=1)
    mirrored = random_source(count=3, size=16)
    mirrored.images = mirrored.images[:, :, ::-1]
    prepare(
        mirrored, flax_encoder(random_vae), tmp_path / "mirrored", image_size=16, batch_size=1, mirrors=False
    )
    both = LatentDataset(tmp_path / "set").read(range(3))["moments"]
    alone = LatentDataset(tmp_path / "mirrored").read(range(3))["moments"]
    np.testing.assert_allclose(both[:, 1], alone[:, 0], atol=1e-3)
    assert np.abs(both[:, 1].astype(np.float32) - both[:, 0]).max() > 0.01


def test_bfloat16_stays_near_float32(random_vae, random_source, tmp_path):
    source, options = random_source(count=4, size=32), {"image_size": 32, "batch_size": 1}
    for precision in ("float32", "bfloat16"):
        prepare(source, flax_encoder(random_vae, precision), tmp_path / precision, **options)
    exact, rough = (
        LatentDataset(tmp_path / name).read(range(4))["moments"].astype(np.float32)
        for name in ("float32", "bfloat16")
    )
    assert 0 < np.abs(exact - rough).max() < 0.05


def test_an_autoencoder_that_is_not_there_is_refused(tmp_path):
    for make in (flax_encoder, diffusers_encoder):
        with pytest.raises(DataError, match=r"--vae: .*nowhere"):
            make(tmp_path / "nowhere")


def test_nothing_unfinished_is_left(small_set):
    assert not (small_set / UNFINISHED).exists()
    assert os.listdir(small_set.parent) == ["set"]
