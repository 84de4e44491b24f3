"""Low-rank adaptation: what it adds to a network, what it moves, what training leaves to the bit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dit_jax import MMDiT
from dit_jax.config import ConfigError, LoraConfig
from dit_jax.interop.lora import lora_state_dict
from dit_jax.interop.sd3 import state_dict_from_params
from dit_jax.models.create import build_model, init_params
from dit_jax.models.lora import merged
from dit_jax.runs.convert import convert
from dit_jax.training.loop import train

LORA = LoraConfig(rank=2, alpha=3.0)
TINY = MMDiT(
    input_size=(4, 6), in_channels=4, hidden_size=32, depth=3, num_heads=2, qk_norm=True, dual_blocks=1,
    positions_side=8, positions_base=4, lora=LORA,
)  # fmt: skip
X, T = np.ones((1, 4, 6, 4), np.float32), np.full(1, 500.0, np.float32)
TEXT = {"context": np.ones((1, 3, 12), np.float32), "pooled": np.ones((1, 10), np.float32)}


def moved(params, seed=0):
    """Random parameters: the first ones leave branches and adaptation out."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def params():
    return moved(jax.jit(TINY.init)(jax.random.key(0), X, T, TEXT)["params"])


def test_it_changes_nothing_at_first_and_every_product_later():
    params = jax.jit(TINY.init)(jax.random.key(0), X, T, TEXT)["params"]
    plain = jax.jit(TINY.clone(lora=LoraConfig()).init)(jax.random.key(0), X, T, TEXT)["params"]
    jax.tree.map(np.testing.assert_array_equal, merged(params, LORA), plain)
    found, own = (
        traverse_util.flatten_dict(p, sep="/") for p in (merged(moved(params), LORA), moved(params))
    )
    changed = {path for path, value in found.items() if not np.array_equal(value, own[path])}
    assert changed == {
        f"{group}/{layer}/kernel"
        for group in ("dual_blocks", "joint_blocks", "last_blocks")
        for layer in ("attn/qkv", "attn/context_qkv", "attn/proj", "mlp/fc1", "mlp/fc2", "attn/context_proj",
                      "context_mlp/fc1", "context_mlp/fc2", "attn2/qkv", "attn2/proj")
        if f"{group}/{layer}/kernel" in own
    }  # fmt: skip
    assert len(changed) == 10 + 8 + 5


def test_the_network_is_that_of_the_merged_weights(params):
    with_it = jax.jit(TINY.apply)({"params": params}, X, T, TEXT)
    without = jax.jit(TINY.apply)({"params": merged(params, LORA)}, X, T, TEXT)
    np.testing.assert_allclose(with_it, without, rtol=1e-5, atol=1e-6)
    assert (
        np.abs(with_it - jax.jit(TINY.apply)({"params": merged(params, LoraConfig())}, X, T, TEXT)).max()
        > 1e-3
    )


def test_diffusers_names_give_the_merged_weights(params):
    """Every module's weight, moved by the file's two matrices, is the one that the merged network is written with."""
    found = lora_state_dict(params["lora"], TINY, LORA)
    base = state_dict_from_params({k: v for k, v in params.items() if k != "lora"}, TINY)
    expected = state_dict_from_params(merged(params, LORA), TINY)
    modules = {name.rpartition(".lora_")[0] for name in found}
    for name, weight in base.items():
        module = "transformer." + name.removesuffix(".weight")
        if module in modules:
            assert found[f"{module}.lora_A.weight"].shape[0] == 2
            weight = weight + found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]
            modules.remove(module)
        np.testing.assert_allclose(weight, expected[name], rtol=1e-5, atol=1e-6)
    assert not modules


def test_a_rank_beyond_the_inputs_is_refused(tiny):
    config = tiny.config()
    config = dataclasses.replace(config, lora=LoraConfig(rank=33))
    with pytest.raises(ConfigError, match=r"--lora.rank is 33; expected at most 32, the inputs of blocks/"):
        init_params(build_model(config), config, jax.random.key(0))


@pytest.mark.slow
def test_training_moves_the_adaptation_alone(tiny, latents, tmp_path, hurried):
    def config(name, **options):
        lora = options.pop("lora", LoraConfig())
        made = tiny.config(
            train={"workdir": str(tmp_path / name), "steps": 2, **options}, data={"dir": str(latents)},
            optim={"learning_rate": 1e-2, "weight_decay": 0.1},
        )  # fmt: skip
        return dataclasses.replace(made, lora=lora)

    with pytest.raises(ConfigError, match=r"--lora.rank is 2 without --train.init-from; expected the run"):
        train(config("alone", lora=LORA))
    base = train(config("base"))
    fine = config("fine", init_from=str(tmp_path / "base"), lora=LORA, steps=4)
    state = train(fine)
    started = jax.device_get(base.ema[0])
    for tree in (state.params, *state.ema):
        own = {name: value for name, value in jax.device_get(tree).items() if name != "lora"}
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.view("i4"), b.view("i4")), own, started)
    up = [leaf for path, leaf in traverse_util.flatten_dict(state.params["lora"]).items() if path[-1] == "up"]
    assert all(np.abs(leaf).max() > 0 for leaf in up)
    moments = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 1]
    assert sum(moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params["lora"]))

    train(
        dataclasses.replace(
            fine, train=dataclasses.replace(fine.train, workdir=str(tmp_path / "parts"), steps=2)
        )
    )
    again = train(
        dataclasses.replace(fine, train=dataclasses.replace(fine.train, workdir=str(tmp_path / "parts")))
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.params), jax.device_get(state.params))

    print(convert(str(tmp_path / "fine"), str(tmp_path / "merged"), "run", tiny_reading()))
    config_of_merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config_of_merged["lora"]["rank"] == 0
    with pytest.raises(ConfigError, match=r"--to is lora, but diffusers loads one for an MMDiT with --text"):
        convert(str(tmp_path / "fine"), str(tmp_path / "x.safetensors"), "lora", tiny_reading())
    with pytest.raises(ConfigError, match=r"--to is lora, but .* was trained with --lora.rank 0"):
        convert(str(tmp_path / "base"), str(tmp_path / "x.safetensors"), "lora", tiny_reading())


def tiny_reading():
    from dit_jax.interop.weights import Reading

    return Reading()


def test_a_hundredth_of_a_large_network_is_trained():
    model = MMDiT.named("SD3-medium", input_size=32, lora=LoraConfig(rank=16))
    shapes = jax.eval_shape(
        model.plain().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 16), np.float32), jnp.zeros(1),
        {"context": jnp.zeros((1, 3, 4096)), "pooled": jnp.zeros((1, 2048))},
    )["params"]  # fmt: skip
    size = {name: sum(leaf.size for leaf in jax.tree.leaves(shapes[name])) for name in shapes}
    share = size["lora"] / (sum(size.values()) - size["lora"])
    assert 0.005 < share < 0.015
