"""The autoencoder of latent diffusion: every tensor against diffusers' own converter, sizes from shapes."""

import warnings

import numpy as np
import pytest
import safetensors.numpy

from dit_jax.config import ConfigError
from dit_jax.interop import diffusers
from dit_jax.interop.keymap import to_torch
from dit_jax.interop.ldm import rules
from dit_jax.interop.weights import Reading
from dit_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from dit_jax.runs.convert import convert

CONFIG = AutoencoderKLConfig(
    block_out_channels=(32, 64, 64), layers_per_block=2, latent_channels=3, scaling_factor=0.18215
)


@pytest.fixture(scope="module")
def tensors():
    """Random tensors under latent diffusion's names."""
    import jax

    rng = np.random.default_rng(0)
    shapes = diffusers.shapes(AutoencoderKL(CONFIG))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    return to_torch(params, rules(len(CONFIG.block_out_channels)))


def test_every_tensor_is_where_diffusers_converter_puts_it(peers, tensors, tmp_path):
    torch, _ = peers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    file = tmp_path / "kl.ckpt"
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(())}, "global_step": 3}, file)
    said = convert(str(file), str(tmp_path / "vae"), None, Reading())
    assert said.endswith("(diffusers): an autoencoder of 3 channels, scaling 0.18215")
    blocks = {"down_block_types": [""] * 3, "up_block_types": [""] * 3}
    expected = convert_ldm_vae_checkpoint(dict(state), blocks)
    found = safetensors.numpy.load_file(tmp_path / "vae" / diffusers.WEIGHTS_FILE)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].squeeze(), tensor.numpy().squeeze(), err_msg=name)
    assert diffusers.load_autoencoder_kl(tmp_path / "vae")[0].config == CONFIG


def test_the_first_stage_of_a_whole_model(tensors, tmp_path):
    whole = {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
    whole |= {"model.diffusion_model.out.2.bias": np.zeros(4, np.float32), "scale_factor": np.float32([0.25])}
    safetensors.numpy.save_file(whole, tmp_path / "sd.safetensors")
    convert(str(tmp_path / "sd.safetensors"), str(tmp_path / "vae"), None, Reading())
    assert diffusers.autoencoder_config(str(tmp_path / "vae")).scaling_factor == 0.25
    convert(str(tmp_path / "sd.safetensors"), str(tmp_path / "b"), "diffusers", Reading(), 0.5)
    assert diffusers.autoencoder_config(str(tmp_path / "b")).scaling_factor == 0.5
    with pytest.raises(ConfigError, match=r"--to is run, but .* is an autoencoder; expected diffusers"):
        convert(str(tmp_path / "sd.safetensors"), str(tmp_path / "c"), "run", Reading())


def test_another_autoencoder_is_named_and_nothing_is_left(tensors, tmp_path):
    file, out = tmp_path / "kl.safetensors", tmp_path / "out" / "vae"

    def refused(message, **changes):
        given = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        safetensors.numpy.save_file(given, file)
        with pytest.raises(ConfigError, match=message):
            convert(str(file), str(out), None, Reading())
        assert not out.exists() and not list(tmp_path.glob("out/.*"))

    refused(r"missing: decoder\.norm_out\.bias \(32,\)", **{"decoder.norm_out.bias": None})
    refused(
        r"unexpected: encoder\.down\.1\.attn\.0\.q\.bias", **{"encoder.down.1.attn.0.q.bias": np.zeros(1)}
    )
    refused("has no convolution encoder.conv_in", **{"encoder.conv_in.weight": None})
    odd = {"encoder.down.0.block.0.conv1.weight": np.zeros((9, 9, 3, 3), np.float32)}
    refused("cannot be used: block_out_channels is", **odd)
