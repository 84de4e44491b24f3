"""Our MMDiT beside diffusers' SD3Transformer2DModel, and the names of both published formats."""

import copy
import functools

import jax
import numpy as np
import pytest

from dit_jax import MMDiT
from dit_jax.config import LoraConfig
from dit_jax.interop import keymap, sd3
from dit_jax.interop.lora import write_lora
from dit_jax.models.lora import with_lora

torch = pytest.importorskip("torch")

LATENT, CHANNELS, HEADS, HEAD_DIM, DEPTH, SIDE = (6, 10), 4, 2, 8, 3, 12
CONTEXT, POOLED, TOKENS = 24, 20, 5
FORMS = {
    "sd3": dict(qk_norm=False, dual_blocks=0),
    "sd3.5": dict(qk_norm=True, dual_blocks=0),
    "mmdit-x": dict(qk_norm=True, dual_blocks=2),
}


def ours(form, **options):
    return MMDiT(
        input_size=LATENT, in_channels=CHANNELS, hidden_size=HEADS * HEAD_DIM, depth=DEPTH, num_heads=HEADS,
        positions_side=SIDE, positions_base=8, **FORMS[form], **options,
    )  # fmt: skip


@functools.cache
def peer(form):
    """diffusers' network of that form, all its weights random: an adaLN that is zero would hide the blocks."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=DEPTH,
        attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, joint_attention_dim=CONTEXT,
        caption_projection_dim=HEADS * HEAD_DIM, pooled_projection_dim=POOLED, pos_embed_max_size=SIDE,
        qk_norm="rms_norm" if FORMS[form]["qk_norm"] else None,
        dual_attention_layers=tuple(range(FORMS[form]["dual_blocks"])),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm_" in name and parameter.ndim == 1 and "linear" not in name else 0.0
            parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def state_dict_of(form):
    return {name: tensor.numpy() for name, tensor in peer(form).state_dict().items()}


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *LATENT, CHANNELS)).astype(np.float32)
    condition = {
        "context": rng.standard_normal((2, TOKENS, CONTEXT)).astype(np.float32),
        "pooled": rng.standard_normal((2, POOLED)).astype(np.float32),
    }
    return x, np.array([37.5, 912.0], np.float32), condition


@functools.cache
def expected(form):
    return outputs_of(peer(form))


def outputs_of(network):
    x, t, condition = inputs()
    with torch.no_grad():
        found = network(
            hidden_states=torch.tensor(x.transpose(0, 3, 1, 2)), timestep=torch.tensor(t),
            encoder_hidden_states=torch.tensor(condition["context"]),
            pooled_projections=torch.tensor(condition["pooled"]), return_dict=False,
        )[0]  # fmt: skip
    return found.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("form", FORMS)
def test_the_network_is_diffusers(form):
    model = ours(form)
    params = sd3.params_from_state_dict(state_dict_of(form), model)
    found = model.apply({"params": params}, *inputs())
    scale = np.abs(expected(form)).max()
    assert scale > 0.5
    np.testing.assert_allclose(found, expected(form), rtol=1e-4, atol=1e-4 * scale)
    plain = model.plain().apply({"params": params}, *inputs())
    np.testing.assert_allclose(plain, found, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("form", FORMS)
def test_weights_go_back_to_the_bit(form):
    model, theirs = ours(form), state_dict_of(form)
    params = sd3.params_from_state_dict(theirs, model)
    back = sd3.state_dict_from_params(params, model)
    assert back.keys() == theirs.keys()
    for name, value in theirs.items():
        if name == "pos_embed.pos_embed":  # computed
            np.testing.assert_allclose(back[name], value, atol=1e-6)
        else:
            np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_a_single_file_has_the_same_weights(form):
    model = ours(form)
    params = sd3.params_from_state_dict(state_dict_of(form), model)
    single = sd3.state_dict_from_params(params, model, single_file=True)
    # Where the last shift and scale stand is the one difference in values between the formats.
    theirs, d = state_dict_of(form), HEADS * HEAD_DIM
    final = single["final_layer.adaLN_modulation.1.weight"]
    np.testing.assert_array_equal(final[:d], theirs["norm_out.linear.weight"][d:])
    text = single[f"joint_blocks.{DEPTH - 1}.context_block.adaLN_modulation.1.bias"]
    np.testing.assert_array_equal(
        text[:d], theirs[f"transformer_blocks.{DEPTH - 1}.norm1_context.linear.bias"][d:]
    )
    fused = single["joint_blocks.0.context_block.attn.qkv.weight"]
    np.testing.assert_array_equal(fused[d : 2 * d], theirs["transformer_blocks.0.attn.add_k_proj.weight"])
    beside = {"first_stage_model.encoder.conv_in.weight": np.zeros(1, np.float32)}
    prefixed = beside | {sd3.SINGLE_FILE_PREFIX + name: value for name, value in single.items()}
    for state_dict in (single, prefixed):
        again = sd3.params_from_state_dict(state_dict, model)
        jax.tree.map(np.testing.assert_array_equal, again, params)


def test_what_does_not_fit_is_listed():
    model, state_dict = ours("sd3.5"), state_dict_of("sd3.5")
    del state_dict["transformer_blocks.1.attn.norm_q.weight"]
    state_dict["extra"] = np.zeros(3, np.float32)
    state_dict["pos_embed.pos_embed"] = state_dict["pos_embed.pos_embed"] + 1
    with pytest.raises(keymap.MismatchError) as caught:
        sd3.params_from_state_dict(state_dict, model)
    text = str(caught.value)
    assert "missing: transformer_blocks.1.attn.norm_q.weight (8,)" in text and "unexpected: extra" in text
    assert "pos_embed.pos_embed is not the 2D sine-cosine table of 12 x 12 positions" in text


def test_diffusers_loads_our_low_rank_adaptation(tmp_path):
    pytest.importorskip("peft", reason="needs peft, by which diffusers loads adaptations")
    import safetensors.torch

    config = LoraConfig(rank=3, alpha=6.0)
    model = ours("mmdit-x", lora=config)
    base = sd3.params_from_state_dict(state_dict_of("mmdit-x"), model.clone(lora=LoraConfig()))
    rng = np.random.default_rng(0)
    params = jax.tree.map(np.asarray, with_lora(base, config, jax.random.key(0)))
    params["lora"] = jax.tree.map(
        lambda a: (0.2 * rng.standard_normal(a.shape)).astype(np.float32), params["lora"]
    )
    write_lora(tmp_path / "ours.safetensors", params["lora"], model, config)
    theirs = copy.deepcopy(peer("mmdit-x"))
    theirs.load_lora_adapter(safetensors.torch.load_file(tmp_path / "ours.safetensors"), prefix="transformer")
    found = jax.jit(model.apply)({"params": params}, *inputs())
    scale = np.abs(expected("mmdit-x")).max()
    np.testing.assert_allclose(found, outputs_of(theirs), atol=1e-4 * scale)
    assert np.abs(found - expected("mmdit-x")).max() > 0.05 * scale
