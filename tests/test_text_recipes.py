"""From labels to captions: five lines of a recipe; and the recipes that are told captions."""

import difflib
import pathlib

import jax
import pytest

from dit_jax.conditions import TextCondition
from dit_jax.config import resolve
from dit_jax.config.recipe import load
from dit_jax.models.create import build_model, init_params
from dit_jax.models.mmdit import MMDiT

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
LINES = {
    "digits": {
        "ModelConfig, OptimConfig, TrainConfig": "ModelConfig, OptimConfig, TextConfig, TrainConfig",
        'dir="data/digits", source="digits"': 'dir="data/digits_text", source="digits-text"',
        "    diffusion=": '    text=TextConfig(encoder="bytes"),\n    diffusion=',
        "input_size=(8, 8)": "input_size=(16, 16)",
    },
    "sit_xl2_imagenet256": {
        "    OptimConfig,\n": "    OptimConfig,\n    TextConfig,\n",
        'dir="data/imagenet256"': 'dir="data/captioned256"',
        "    diffusion=": '    text=TextConfig(encoder="Qwen/Qwen3-0.6B"),\n    diffusion=',
    },
}


def built(path):
    """(the resolved recipe, its network, shapes of its parameters)."""
    config = resolve(load(path))
    model = build_model(config)
    return config, model, jax.eval_shape(lambda key: init_params(model, config, key), jax.random.key(0))


@pytest.mark.parametrize("recipe", LINES)
def test_five_changed_lines_make_a_recipe_of_labels_one_of_captions(recipe, tmp_path):
    labels = changed = (CONFIGS / f"{recipe}.py").read_text()
    for found, put in LINES[recipe].items():
        assert changed.count(found) == 1, found
        changed = changed.replace(found, put)
    diff = [line for line in difflib.ndiff(labels.splitlines(), changed.splitlines()) if line[:2] == "+ "]
    assert 0 < len(diff) <= 5
    (tmp_path / "captions.py").write_text(changed)
    config, model, params = built(tmp_path / "captions.py")
    assert isinstance(model.condition, TextCondition) and model.condition.encoder == config.text.encoder
    assert "context_embed" in params and "y_embed" not in params


@pytest.mark.parametrize(
    ("name", "encoder", "millions", "shift"),
    [
        ("digits_text", "bytes", 2.6, 1.0),
        ("dit_xl2_text256", "Qwen/Qwen3-0.6B", 826, 1.0),
        ("sd3_medium_256", "sd3", 2028, 1.0),
        ("sd3_medium_512", "sd3", 2028, 1.5),
        ("sd3_medium_1024", "sd3", 2028, 3.0),
    ],
)
def test_recipes_that_are_told_captions(name, encoder, millions, shift):
    config, model, params = built(CONFIGS / f"{name}.py")
    assert (config.text.encoder, config.diffusion.kind, config.diffusion.shift) == (encoder, "flow", shift)
    assert not config.data.mirror  # captions may say left and right
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6 == pytest.approx(millions, rel=0.02)
    if name.startswith("sd3"):
        assert isinstance(model, MMDiT) and model.condition.encoder_dropout == 0.464
        assert config.diffusion.time_direction == "to_noise" and config.optim.warmup_steps == 1000
        side = int(name.rpartition("_")[2])
        assert config.model.input_size == (side // 8, side // 8)
