"""Samples by the thousand: parts that go on, the same samples in whatever parts and by whatever processes."""

import errno
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from started import finish, joined, start, together, wait_for

from dit_jax.commands import sample as sample_command
from dit_jax.config import ConfigError
from dit_jax.evaluation.samples import load_provenance, write_samples
from dit_jax.generation import command, stream
from dit_jax.generation.command import SampleArgs
from dit_jax.generation.decoding import make_decoder, pictures_at_once
from dit_jax.generation.parts import Parts, parts_of
from dit_jax.generation.prompts import Asked, asked_of
from dit_jax.interop.diffusers import load_autoencoder_kl
from dit_jax.samplers.noise import choices, sample_keys

FEW = {"num_samples": 44, "steps": 2, "batch_size": 16}


def sample(run, npz, **options):
    """The arrays of a file that sample.py wrote."""
    assert command.main(SampleArgs(workdir=str(run), npz=str(npz), **FEW | options)) == 0
    with np.load(npz) as found:
        return dict(found)


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory):
    return sample(tiny_run, tmp_path_factory.mktemp("whole") / "s.npz")


class Killed(Exception):
    """Stands for whatever ends a process."""


def killed(*_):
    raise Killed


def test_a_file_of_samples_holds_them_in_order_and_says_where_they_come_from(tiny_run, undisturbed, tmp_path):
    assert undisturbed["arr_0"].shape == (44, 32, 32, 3) and undisturbed["arr_0"].std() > 1
    np.testing.assert_array_equal(undisturbed["arr_1"], np.arange(44) % 10)
    args = SampleArgs(workdir=str(tiny_run), out=str(tmp_path / "a.png"), grid_count=40, **FEW)
    assert command.main(args) == 0  # not by parts
    sample(tiny_run, tmp_path / "s.npz", out=str(tmp_path / "b.png"), grid_count=40)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    known = load_provenance(tmp_path / "s.npz")
    assert (known.step, known.sampler, known.steps, known.seed) == (5, "unipc_2", 2, 0)
    assert not parts_of(tmp_path / "s.npz").exists()


def test_what_was_drawn_before_the_end_is_kept(tiny_run, undisturbed, tmp_path, monkeypatch):
    kept = []
    put = Parts.put

    def twice(self, start, arrays):
        if len(kept) == 2:
            raise Killed
        kept.append(start)
        put(self, start, arrays)

    monkeypatch.setattr(Parts, "put", twice)
    with pytest.raises(Killed):
        sample(tiny_run, tmp_path / "s.npz")
    assert not (tmp_path / "s.npz").exists() and kept == [0, 16]
    monkeypatch.setattr(
        Parts, "put", lambda self, start, arrays: (kept.append(start), put(self, start, arrays))
    )
    # Killed as well when all was there but the file.
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_samples", killed)
        with pytest.raises(Killed):
            sample(tiny_run, tmp_path / "s.npz")
    found = sample(tiny_run, tmp_path / "s.npz")
    assert kept == [0, 16, 32]
    for name in ("arr_0", "arr_1"):
        np.testing.assert_array_equal(found[name], undisturbed[name])
    assert not parts_of(tmp_path / "s.npz").exists()


def test_another_batch_size_goes_on_with_the_same_parts(tiny_run, undisturbed, tmp_path):
    folder, part = parts_of(tmp_path / "s.npz"), undisturbed["arr_0"]
    args = SampleArgs(workdir=str(tiny_run), npz=str(tmp_path / "s.npz"), **FEW)
    run = command.load_run(tiny_run)
    asked = asked_of(args, run, command.sampling_model(run.config))
    with Parts(
        "--npz", folder, command.recipe(args, run, {"step": 5, "guide_step": None}, asked), 44
    ) as parts:
        assert parts.missing == [(0, 44)]
        parts.put(20, {"images": part[20:30]})
        parts.put(4, {"images": 255 - part[4:8]})  # marked: what is there is not drawn again
    found = sample(tiny_run, tmp_path / "s.npz", batch_size=24)["arr_0"].astype(int)
    np.testing.assert_array_equal(found[4:8], 255 - part[4:8])
    rest = np.r_[0:4, 8:44]
    assert np.abs(found[rest] - part[rest]).max() <= 1


def test_a_part_that_is_cut_off_is_made_again_and_a_changed_one_is_named(tmp_path, capsys):
    images = np.arange(6 * 300, dtype=np.uint8).reshape(6, 300)

    def parts():
        return Parts("--npz", tmp_path / "p", {"seed": 0}, 6)

    with parts() as found:
        found.put(0, {"images": images[:3]})
        found.put(3, {"images": images[3:]})
    first, second = (tmp_path / "p" / f"000000000{i}-000000000{i + 3}.npz" for i in (0, 3))
    whole = first.read_bytes()
    first.write_bytes(whole[:200])
    (tmp_path / "p" / "notes.npz").write_text("somebody's own")
    with parts() as found:
        assert found.missing == [(0, 3)] and not first.exists()
    assert f"warning: {first} cannot be read" in capsys.readouterr().err
    first.write_bytes(whole)
    with parts() as found:
        assert found.missing == []
        np.testing.assert_array_equal(np.concatenate([part["images"] for part in found.read()]), images)
        changed = bytearray(second.read_bytes())
        changed[500] ^= 1
        second.write_bytes(changed)
        with pytest.raises(
            ConfigError, match=f"{second.name} cannot be read .*: remove it, and the same command"
        ):
            list(found.read())


def test_a_disk_that_is_full_by_now_ends_in_one_sentence(tiny_run, tmp_path, monkeypatch, capsys):
    put, count = np.savez, []

    def full(*args, **arrays):
        count.append(1)
        if len(count) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(*args, **arrays)

    options = ["--workdir", str(tiny_run), "--npz", str(tmp_path / "s.npz")]
    options += [part for name, value in FEW.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(np, "savez", full)
    assert sample_command.main("sample.py", options) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        f"sample.py: {tmp_path / 's.npz.parts'} cannot be written to (No space left on device);"
    )
    assert sample_command.main("sample.py", options) == 0 and (tmp_path / "s.npz").is_file()


def test_parts_of_another_command_are_refused(tiny_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_samples", killed)
        with pytest.raises(Killed):
            sample(tiny_run, tmp_path / "s.npz")
    for options, message in (
        ({"seed": 1}, "samples with seed 0, not 1; expected the same command"),
        ({"steps": 3}, "samples with steps 2, not 3"),
        ({"num_samples": 45}, "samples with num_samples 44, not 45"),
        ({"labels": ["3"]}, r"samples with labels \[\], not \['3'\]"),
        ({"step": 3}, "samples with step 5, not 3"),
        ({"cfg_scale": 2.0}, "samples with cfg_scale 1.5, not 2.0"),
    ):
        with pytest.raises(ConfigError, match=rf"--npz: .*s\.npz\.parts holds {message}") as refused:
            sample(tiny_run, tmp_path / "s.npz", **options)
        assert "\n" not in str(refused.value)
    folder = parts_of(tmp_path / "s.npz")
    with Parts("--npz", folder, json.loads((folder / "recipe.json").read_text()), 44) as parts:
        assert parts.missing == []
        (folder / "64f7-a.json").write_text("")  # a result, named by a hash, is no part
        with pytest.raises(ConfigError, match="--npz: another command is filling"):
            sample(tiny_run, tmp_path / "s.npz")
    (folder / "recipe.json").write_text("[")
    with pytest.raises(ConfigError, match=r"recipe\.json cannot be read"):
        sample(tiny_run, tmp_path / "s.npz")


def test_the_next_batch_is_on_its_way_before_the_last_is_fetched(tiny_run, tmp_path, monkeypatch):
    order = []
    batch_of, put = stream.batch_of, Parts.put
    monkeypatch.setattr(
        stream,
        "batch_of",
        lambda c, start, *rest: (order.append(f"draw {start}"), batch_of(c, start, *rest))[1],
    )
    monkeypatch.setattr(
        Parts, "put", lambda self, start, arrays: (order.append(f"put {start}"), put(self, start, arrays))
    )
    sample(tiny_run, tmp_path / "s.npz")
    assert order == ["draw 0", "draw 16", "put 0", "draw 32", "put 16", "put 32"]


def test_values_that_are_not_finite_are_no_pictures(tiny_run, tmp_path, monkeypatch):
    make = stream.make_latent_sampler

    def broken(*args):
        def sampler(params, seed, numbers, *told):
            latents, evaluations = make(*args)(params, seed, numbers, *told)
            return jnp.where((numbers == 17)[:, None, None, None], jnp.nan, latents), evaluations

        return sampler

    monkeypatch.setattr(stream, "make_latent_sampler", broken)
    with pytest.raises(FloatingPointError, match="samples 16 to 31 hold values that are not finite"):
        sample(tiny_run, tmp_path / "s.npz")


def test_random_labels_are_of_the_seed_and_the_number():
    keys = sample_keys(jax.random.key(3), np.arange(2000))
    drawn = np.asarray(choices(keys, 10))
    np.testing.assert_array_equal(drawn[7:9], choices(sample_keys(jax.random.key(3), np.arange(7, 9)), 10))
    assert (np.bincount(drawn, minlength=10) > 140).all() and len(np.bincount(drawn)) == 10
    assert (drawn != np.asarray(choices(sample_keys(jax.random.key(4), np.arange(2000)), 10))).mean() > 0.8
    asked = Asked({"label": np.array([3, 7], np.int32)})
    rows = asked.rows(SampleArgs(label_order="random", seed=3), 50)
    labels = asked.conditions(rows)["label"]
    assert set(labels) == {3, 7} and labels.dtype == np.int32
    np.testing.assert_array_equal(rows[:9], asked.rows(SampleArgs(label_order="random", seed=3), 9))


def test_pictures_are_decoded_in_chunks_that_fit():
    vae, params = load_autoencoder_kl("digits")
    latents = np.random.default_rng(0).normal(size=(21, 4, 4, 4)).astype(np.float32)
    whole = np.asarray(make_decoder(vae, params, 1.0, 0.0)(latents))
    for at_once in (1, 2, 100):
        found = np.asarray(make_decoder(vae, params, 1.0, 0.0, at_once)(latents))
        assert found.shape == whole.shape == (21, 16, 16, 3) and found.dtype == np.uint8
        assert np.abs(found.astype(int) - whole).max() <= 1
    # Stable Diffusion's on 16 GiB, a quarter of which is for this: 9 GiB are 64 pictures.
    assert pictures_at_once(128, 256 * 256, 16 * 2**30) == 28
    assert pictures_at_once(128, 512 * 512, 16 * 2**30) == 7
    assert pictures_at_once(128, 4096 * 4096, 16 * 2**30) == 1


def test_blocks_become_the_file_that_numpy_writes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(10)
    write_samples(tmp_path / "a.npz", (images[i : i + 3] for i in range(0, 10, 3)), labels)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        np.testing.assert_array_equal(found["arr_0"], images)
        np.testing.assert_array_equal(found["arr_1"], labels)
        assert found.zip.testzip() is None


# --------------------------------------------------------------------------------------- as users start it


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tiny_run, tmp_path):
    options = ("--workdir", tiny_run, "--num-samples", 44, "--steps", 2, "--batch-size", 16)
    finish(start("sample.py", *options, "--npz", tmp_path / "one.npz", devices=2))
    first, second = together(
        joined("sample.py", *options, "--npz", tmp_path / "two.npz", "--out", tmp_path / "g.png")
    )
    assert "44 pictures of step 5" in first.said and "pictures" not in second.said
    with np.load(tmp_path / "one.npz") as a, np.load(tmp_path / "two.npz") as b:
        for name in ("arr_0", "arr_1"):
            np.testing.assert_array_equal(a[name], b[name])
    assert sorted(os.listdir(tmp_path)) == ["g.png", "one.npz", "two.npz"]


@pytest.mark.slow
def test_a_failure_in_one_process_ends_both_with_one_sentence(tiny_run, tmp_path):
    options = ("--workdir", tiny_run, "--steps", 2, "--num-samples", 44)
    own = (("--vae", "digits"), ("--vae", tmp_path / "moved"))  # nobody but process 1 misses it
    processes = together(joined("sample.py", *options, "--npz", tmp_path / "s.npz", own=own), code=2)
    said = "".join(process.said for process in processes)
    assert said.count("the dataset's autoencoder cannot be read") == 1, said
    assert "Traceback" not in said, said


@pytest.mark.slow
def test_a_process_that_is_killed_is_gone_on_with(tiny_run, tmp_path):
    npz = tmp_path / "s.npz"
    options = ("--workdir", tiny_run, "--steps", 50, "--batch-size", 16, "--num-samples", 400)
    process = start("sample.py", *options, "--npz", npz)
    wait_for(lambda: len(list(parts_of(npz).glob("0*.npz"))) >= 3, process)
    process.kill()
    finish(process, code=-signal.SIGKILL)
    assert not npz.exists()
    finish(*(start("sample.py", *options, "--npz", file) for file in (npz, tmp_path / "whole.npz")))
    with np.load(npz) as a, np.load(tmp_path / "whole.npz") as b:
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
