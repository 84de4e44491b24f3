"""convert.py between folders and files of buckets: the same to the bit, and nothing is left where it fails."""

import json

import jax
import numpy as np
import pytest

from dit_jax import paths
from dit_jax.commands import convert as command
from dit_jax.data.metadata import LatentMetadata
from dit_jax.files import write_whole
from dit_jax.generation.command import SampleArgs, load_run, main
from dit_jax.interop import keymap
from dit_jax.interop.diffusers import copy_autoencoder, load_autoencoder_kl, weights_hash
from dit_jax.interop.formats import read_weights
from dit_jax.interop.weights import Latents, Reading, Weights, shapes_of
from dit_jax.runs.convert import LAST, convert, read_run, write_run

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def config(tiny):
    return tiny.config(model={"mlp_ratio": 4.0}, diffusion={"num_timesteps": 1000})


@pytest.fixture(scope="module")
def weights(config):
    """Random ones of the digits' latents."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes_of(config))
    latents = Latents("digits", 32, 1.0)
    metadata = LatentMetadata(
        source="s", source_hash="a", source_count=4, vae="digits", vae_hash=weights_hash("digits"),
        vae_backend="flax", precision="float32", scaling_factor=1.0, shift_factor=0.0, latent_shape=(8, 8, 4),
        image_size=32, crop="", mirrors=False, dtype="float16", num_classes=4, label_names=("a", "b", "c", "d"),
        shard_size=4, batch_size=4, count=4, shard_sha256=("0",),
    )  # fmt: skip
    dataset = json.loads(metadata.to_json())
    return Weights(config, params, "run", latents, ("a", "b", "c", "d"), 12, dataset)


def same_bits(found, expected):
    found, expected = keymap.flatten(found), keymap.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("kind", ["google", "amazon"])
def test_every_format_in_a_bucket_to_the_bit(kind, request, peers, weights, config, tmp_path):
    store = request.getfixturevalue(kind)
    folder = f"{store.bucket()}/w"
    write_run(tmp_path / "run", weights)
    convert(str(tmp_path / "run"), f"{folder}/x.pt", None, Reading())
    store.requests.clear()
    said = convert(f"{folder}/x.pt", f"{folder}/run", None, Reading(config=config, vae="digits"))
    contents = "alt=media" if kind == "google" else "x.pt"
    reads = [path for method, path in store.requests if method == "GET" and "x.pt" in path.partition("&")[0]]
    assert len([path for path in reads if contents in path and "list-type" not in path]) == 1
    assert said.startswith(f"{folder}/run (run): ")
    same_bits(read_run(f"{folder}/run", Reading()).params, weights.params)
    for to, source in (("diffusers", "run"), ("folder", "diffusers")):
        store.requests.clear()
        convert(f"{folder}/{source}", f"{folder}/{to}", to, Reading())
        puts = [path for method, path in store.requests if method in ("POST", "PUT") and ".probe" not in path]
        assert LAST[to] in puts[-1] and "safetensors" in "".join(puts[:-1])
    found = read_weights(f"{folder}/folder", Reading(), "IN")
    same_bits(found.params, weights.params)
    assert found.latents.vae == f"{folder}/folder" and weights_hash(found.latents.vae) == weights_hash(
        "digits"
    )
    same_bits(load_autoencoder_kl(f"{folder}/diffusers")[1], load_autoencoder_kl("digits")[1])
    convert(f"{folder}/diffusers", f"{folder}/back", "run", Reading())
    same_bits(read_run(f"{folder}/back", Reading()).params, weights.params)


def test_pictures_of_weights_in_a_bucket_are_those_of_a_disk(google, weights, tmp_path):
    folder = f"{google.bucket()}/w"
    write_run(tmp_path / "run", weights)
    write_run(paths.to_path(f"{folder}/run"), weights)
    copy_autoencoder("digits", tmp_path / "vae")
    for name, file in paths.files_below(tmp_path / "vae").items():
        paths.copy(file, paths.to_path(f"{folder}/vae/{name}"))
    few = {"num_samples": 2, "steps": 3, "cfg_scale": 2.0}
    assert main(SampleArgs(workdir=str(tmp_path / "run"), **few)) == 0
    assert main(SampleArgs(workdir=f"{folder}/run", vae=f"{folder}/vae", **few)) == 0  # the grid beside it
    expected = (tmp_path / "run" / "samples.png").read_bytes()
    assert paths.to_path(f"{folder}/run/samples.png").read_bytes() == expected
    convert(f"{folder}/run", f"{folder}/hub", None, Reading())
    out = f"{folder}/other.png"
    assert main(SampleArgs(source=f"{folder}/hub", out=out, **few)) == 0
    assert paths.to_path(out).read_bytes() == expected
    assert load_run(f"{folder}/run").place == f"{folder}/run"


@pytest.mark.parametrize("to", ["run", "diffusers", "pt"])
def test_what_the_store_refuses_leaves_nothing(google, peers, weights, tmp_path, to):
    folder = f"{google.bucket()}/w"
    write_run(tmp_path / "run", weights)
    convert(str(tmp_path / "run"), str(tmp_path / "hub"), "folder", Reading())
    last = {"run": "config.json", "diffusers": "model_index.json", "pt": "out"}[to]
    refused = google.failing(lambda method, path: method == "POST" and last in path, status=403)
    with refused as fault, pytest.raises(OSError, match="the store refuses or does not answer"):
        convert(str(tmp_path / "hub"), f"{folder}/out", to, Reading())
    assert fault.seen and paths.files_below(paths.to_path(folder)) == {}


def test_what_is_there_or_not_is_said(google, capsys):
    folder = f"{google.bucket()}/w"
    write_whole(f"{folder}/out/x", "")
    write_whole(f"{folder}/x.pt", "no weights")
    for source, out, message in (
        ("a", f"{folder}/out", f"OUT is {folder}/out, which exists; expected a new name"),
        (f"{folder}/none", f"{folder}/new", f"IN is '{folder}/none', which is not there; expected a file"),
        (f"{folder}/x.pt", f"{folder}/new", f"{folder}/x.pt is no whole file of PyTorch's"),
        (f"{folder}/out", f"{folder}/new", f"IN is {folder}/out, which has neither model_index.json"),
    ):
        assert command.main("convert.py", [source, out]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"convert.py: {message}") and said.count("\n") == 1
    with google.failing(status=403), pytest.raises(OSError, match="the store refuses"):  # not "not there"
        convert(f"{folder}/x.pt", f"{folder}/new", None, Reading())
    assert paths.names_in(paths.to_path(folder)) == ["out", "x.pt"]
    with pytest.raises(FileNotFoundError, match=r"autoencoder 'gs://.*/out': expected config.json and"):
        load_autoencoder_kl(f"{folder}/out")
