"""Autoencoders in diffusers' format: against the PyTorch class, back and forth, and what is refused."""

import hashlib
import json
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dit_jax.interop import diffusers, keymap
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

TINY = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 3}
SD = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
SD3 = {
    **SD, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
    "shift_factor": 0.0609, "scaling_factor": 1.5305,
}  # fmt: skip


def torch_autoencoder(config):
    """diffusers' PyTorch autoencoder with random weights, affines of the norms included."""
    torch = pytest.importorskip("torch", reason="needs torch and diffusers: pip install dit_jax[interop]")
    pytest.importorskip("diffusers", reason="needs torch and diffusers: pip install dit_jax[interop]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own imports
        from diffusers import AutoencoderKL as TorchAutoencoderKL
    torch.manual_seed(0)
    blocks = len(config["block_out_channels"])
    vae = TorchAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **config
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return torch, vae


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def check_parity(config, side, folder):
    """Encode and decode agree to 1e-4 relative with weights written by `save_pretrained`."""
    torch, vae = torch_autoencoder(config)
    vae.save_pretrained(folder)
    model, params = diffusers.load_autoencoder_kl(folder)
    assert model.config.scaling_factor == vae.config.scaling_factor
    assert model.config.shift_factor == vae.config.shift_factor
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    f = model.downsample_factor
    z = rng.standard_normal((2, side // f, side // f, model.config.latent_channels)).astype(np.float32)

    def nchw(x):
        return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())

    with torch.no_grad():
        posterior = vae.encode(nchw(images)).latent_dist
        expected = [posterior.mean, posterior.std, vae.decode(nchw(z)).sample]
    encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))
    decode = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))
    found = [*encode(params, images), decode(params, z)]
    for name, one, other in zip(("mean", "std", "decoded"), found, expected, strict=True):
        assert relative(one, other.numpy().transpose(0, 2, 3, 1)) < 1e-4, name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609},
        {"mid_block_add_attention": False, "layers_per_block": 2, "block_out_channels": (8, 8, 16)},
    ],
    ids=["attention", "no-quant-convs", "no-attention"],
)
def test_parity_with_torch(changes, tmp_path):
    check_parity({**TINY, **changes}, 16, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD, SD3], ids=["sd", "sd3"])
def test_parity_with_torch_at_full_size(config, tmp_path):
    check_parity(config, 64, tmp_path)


def test_torch_reads_what_we_write(tmp_path):
    _, reference = torch_autoencoder(TINY)
    reference.save_pretrained(tmp_path / "theirs")
    model, params = diffusers.load_autoencoder_kl(tmp_path / "theirs")
    diffusers.save_autoencoder_kl(tmp_path / "ours", model, params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vae = type(reference).from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    for name, tensor in reference.state_dict().items():
        np.testing.assert_array_equal(vae.state_dict()[name].numpy(), tensor.numpy())


@pytest.fixture(scope="module")
def tiny():
    """A tiny autoencoder with random parameters everywhere."""
    model = AutoencoderKL(AutoencoderKLConfig(**TINY))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), params)


def assert_same(found, expected):
    found, expected = keymap.flatten(found), keymap.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_round_trip_to_the_bit(tiny, tmp_path):
    model, params = tiny
    diffusers.save_autoencoder_kl(tmp_path, model, params)
    loaded, back = diffusers.load_autoencoder_kl(tmp_path)
    assert loaded == model
    assert_same(back, params)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_half_precision_file_gives_float32_parameters(tiny, tmp_path):
    model, params = tiny
    diffusers.save_autoencoder_kl(tmp_path, model, params, np.float16)
    half = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), params)
    assert_same(diffusers.load_autoencoder_kl(tmp_path)[1], half)


def test_old_names_of_the_attention_layers(tiny, tmp_path):
    model, params = tiny
    diffusers.save_autoencoder_kl(tmp_path, model, params)
    file = tmp_path / diffusers.WEIGHTS_FILE
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in safetensors.numpy.load_file(file).items():
        for new_part, old_part in old.items():
            name = name.replace(f"attentions.0.{new_part}.", f"attentions.0.{old_part}.")
        tensors[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    safetensors.numpy.save_file(tensors, file)
    assert_same(diffusers.load_autoencoder_kl(tmp_path)[1], params)


def test_pipeline_folder_and_named_subfolder(tiny, tmp_path):
    model, params = tiny
    diffusers.save_autoencoder_kl(tmp_path / "vae", model, params)
    assert_same(diffusers.load_autoencoder_kl(tmp_path)[1], params)
    assert_same(diffusers.load_autoencoder_kl(tmp_path, "vae")[1], params)
    with pytest.raises(FileNotFoundError, match=r"expected config\.json and diffusion_pytorch_model"):
        diffusers.load_autoencoder_kl(tmp_path, "other")


def test_hub_id_fetches_only_the_two_files(tiny, tmp_path, monkeypatch):
    import huggingface_hub

    model, params = tiny
    diffusers.save_autoencoder_kl(tmp_path / "vae", model, params)
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same(diffusers.load_autoencoder_kl("some/pipeline", "vae")[1], params)
    assert asked == [("some/pipeline", ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"])]


def test_a_repository_out_of_reach_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="'nobody/no-such-vae' is neither a folder nor a hub repository"
    ):
        diffusers.load_autoencoder_kl("nobody/no-such-vae")  # conftest keeps the hub offline


def test_a_misspelt_folder_is_named():
    with pytest.raises(FileNotFoundError, match=r"'\./nothing/here/at/all' is not a folder"):
        diffusers.load_autoencoder_kl("./nothing/here/at/all")


def test_weights_that_do_not_fit_are_listed(tiny, tmp_path):
    model, params = tiny
    diffusers.save_autoencoder_kl(tmp_path, model, params)
    file = tmp_path / diffusers.WEIGHTS_FILE
    tensors = safetensors.numpy.load_file(file)
    del tensors["decoder.conv_in.bias"]
    tensors["quant_conv.weight"] = tensors["quant_conv.weight"][:, :, 0, 0].copy()
    tensors["ema.decay"] = np.zeros(1, np.float32)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match="safetensors does not fit the model") as error:
        diffusers.load_autoencoder_kl(tmp_path)
    for part in (
        "missing: decoder.conv_in.bias",
        "unexpected: ema.decay",
        "misshapen: quant_conv.weight is (6, 6)",
    ):
        assert part in str(error.value)


def test_a_broken_file_is_named(tiny, tmp_path):
    model, params = tiny
    diffusers.save_autoencoder_kl(tmp_path, model, params)
    file = tmp_path / diffusers.WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"safetensors is not a whole safetensors file"):
        diffusers.load_autoencoder_kl(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"act_fn": "relu"}))
    with pytest.raises(ValueError, match=r"config\.json: act_fn is 'relu'"):
        diffusers.load_autoencoder_kl(tmp_path)


def test_a_failed_save_leaves_the_old_files(tiny, tmp_path, monkeypatch):
    model, params = tiny
    diffusers.save_autoencoder_kl(tmp_path, model, params)
    before = diffusers.weights_hash(tmp_path)
    bad = {**params, "quant_conv": {"kernel": np.zeros((1, 1, 2, 2)), "bias": np.zeros(2)}}
    with pytest.raises(ValueError, match=r"params does not fit the model: .*misshapen"):
        diffusers.save_autoencoder_kl(tmp_path, model, bad)

    def full_disk(self, data):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        diffusers.save_autoencoder_kl(tmp_path, model, jax.tree.map(lambda x: 2 * x, params))
    assert diffusers.weights_hash(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_weights_hash_is_of_the_files_content(tiny, tmp_path):
    model, params = tiny
    diffusers.save_autoencoder_kl(tmp_path, model, params)
    content = (tmp_path / diffusers.WEIGHTS_FILE).read_bytes()
    assert diffusers.weights_hash(tmp_path) == hashlib.sha256(content).hexdigest()
    assert diffusers.weights_hash("digits") != diffusers.weights_hash(tmp_path)
