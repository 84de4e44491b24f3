"""The published checkpoints' names: a round trip, and errors that list what is wrong."""

import numpy as np
import pytest

from dit_jax import DiT
from dit_jax.interop.official import params_from_state_dict, state_dict_from_params


@pytest.fixture(scope="module")
def published(data_dir):
    data = np.load(data_dir / "official_dit_learned_sigma.npz")
    settings = {k.removeprefix("config/"): data[k].item() for k in data.files if k.startswith("config/")}
    return DiT(**settings), {
        k.removeprefix("params/"): data[k] for k in data.files if k.startswith("params/")
    }


def test_round_trip_gives_every_tensor_back(published):
    model, state = published
    back = state_dict_from_params(params_from_state_dict(state, model), model)
    assert set(back) == set(state)
    for name, value in state.items():
        np.testing.assert_allclose(back[name], value, atol=1e-6 if name == "pos_embed" else 0, err_msg=name)


def test_every_problem_is_listed(published):
    model, state = published
    broken = dict(state)
    broken["blocks.1.attn.qkv.bias"] = broken["blocks.1.attn.qkv.bias"][:-1]
    del broken["final_layer.linear.weight"]
    broken["blocks.7.mlp.fc1.bias"] = state["blocks.0.mlp.fc1.bias"]
    with pytest.raises(ValueError, match="does not fit") as error:
        params_from_state_dict(broken, model)
    text = str(error.value)
    assert "missing final_layer.linear.weight (32, 48)" in text
    assert "unexpected blocks.7.mlp.fc1.bias" in text
    assert "blocks.1.attn.qkv.bias has shape (143,), expected (144,)" in text


def test_another_position_table_is_refused(published):
    model, state = published
    with pytest.raises(ValueError, match="pos_embed is not the 2D sine-cosine table"):
        params_from_state_dict(state | {"pos_embed": state["pos_embed"] + 0.1}, model)


def test_other_conditionings_have_no_published_checkpoint(published):
    model, state = published
    with pytest.raises(ValueError, match="conditioning is 'adaln'"):
        params_from_state_dict(state, model.clone(conditioning="adaln"))
