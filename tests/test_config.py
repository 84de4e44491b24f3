"""Configs: parsing, resolution, one clear error for everything wrong."""

import pytest

from dit_jax import config as c

RECIPE = """
from dit_jax.config import Config, ModelConfig, TrainConfig
config = Config(model=ModelConfig(name="DiT-S/2"), train=TrainConfig(batch_size=8, seed=3))
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return str(path)


def test_the_command_line_overrides_the_recipe_which_overrides_the_defaults(recipe):
    config = c.parse_args(["--config", recipe, "--train.batch-size", "16", "--model.depth", "5"])
    assert (config.train.batch_size, config.train.seed, config.train.log_every) == (16, 3, 100)
    assert (config.model.depth, config.model.hidden_size, config.model.patch_size) == (5, 384, 2)


def test_json_round_trip():
    config = c.resolve(c.Config(model=c.ModelConfig(name="DiT-B/4", input_size=(16, 24))))
    assert c.from_json(c.to_json(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {"dept": 3}}', "unknown option 'model.dept'"),
        ('{"modl": {}}', "unknown option 'modl'"),
        ('{"model": {"depth": "3"}}', "--model.depth is '3'; input should be a valid integer"),
        ('{"optim": {"schedule": "step"}}', "--optim.schedule is 'step'; input should be 'constant'"),
        ("{", "invalid json"),
    ],
)
def test_a_saved_config_is_read_strictly(text, message):
    with pytest.raises(c.ConfigError, match=message):
        c.from_json(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "DiT-M/2"}, "--model.name is 'DiT-M/2'; expected DiT-{S,B,L,XL}/{patch}"),
        (
            {"input_size": (31, 32)},
            r"--model.input-size is \(31, 32\); expected sides divisible by --model.patch-size 2",
        ),
        ({"num_heads": 7}, "--model.hidden-size is 1152; expected a multiple of --model.num-heads 7"),
        ({"hidden_size": 6, "num_heads": 1}, "--model.hidden-size is 6; expected a multiple of 4"),
        ({"depth": 0}, "--model.depth is 0; expected a number above 0"),
        ({"class_dropout_prob": 1.0}, "--model.class-dropout-prob is 1.0; expected at least 0 and below 1"),
        ({"depth": "3"}, "--model.depth is '3'; input should be a valid integer"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(c.ConfigError, match=message):
        c.resolve(c.Config(model=c.ModelConfig(**options)))


@pytest.mark.parametrize(
    ("diffusion", "train", "message"),
    [
        ({"num_timesteps": 20}, {"sample_every": 0}, "--diffusion.num-timesteps is 20; expected at least 21"),
        (
            {"num_timesteps": 1, "schedule": "squaredcos_cap_v2"},
            {},
            "num-timesteps is 1; expected at least 2",
        ),
        (
            {"num_timesteps": 40},
            {},
            "--train.sample-steps is 50; expected 2 to 40, the timesteps of training",
        ),
        ({}, {"sample_steps": 1}, "--train.sample-steps is 1; expected 2 to 1000"),
        ({}, {"seed": 2**31}, "--train.seed is 2147483648; expected at most 2147483647"),
    ],
)
def test_what_a_run_would_find_out_too_late_is_refused(diffusion, train, message):
    with pytest.raises(c.ConfigError, match=message):
        c.resolve(c.Config(diffusion=c.DiffusionConfig(**diffusion), train=c.TrainConfig(**train)))


@pytest.mark.parametrize(
    ("args", "unroll"),
    [
        ([], "auto"),
        (["--model.unroll"], True),
        (["--model.unroll", "--model.depth", "5"], True),
        (["--model.no-unroll"], False),
        (["--model.unroll", "--model.no_unroll"], False),
        (["--model.unroll", "auto"], "auto"),
        (["--model.unroll", "true", "--model.depth", "5"], True),
        (["--model.unroll=false"], False),
        (["--model.unroll=True"], True),
    ],
)
def test_unroll_is_a_switch_and_a_choice_of_three(recipe, args, unroll):
    assert c.parse_args(["--config", recipe, *args]).model.unroll is unroll


def test_unroll_is_read_from_configs_of_before_and_refused_in_one_sentence(recipe, capsys):
    for value in (True, False, "auto"):
        text = c.to_json(c.Config(model=c.ModelConfig(unroll=value)))
        assert c.from_json(text).model.unroll is value
    for value in ('"on"', "2", "null"):
        with pytest.raises(c.ConfigError, match=r"--model.unroll is .*; input should be"):
            c.from_json(f'{{"model": {{"unroll": {value}}}}}')
    with pytest.raises(SystemExit) as stop:
        c.parse_args(["--config", recipe, "--model.unroll", "on"])
    assert stop.value.code == 2
    assert "--model.unroll" in capsys.readouterr().err


def test_unknown_options_and_wrong_types_stop_the_command(recipe, capsys):
    for args, words in (
        (["--model.dept", "3"], "--model.dept"),
        (["--model.depth", "three"], "--model.depth"),
    ):
        with pytest.raises(SystemExit) as stop:
            c.parse_args(["--config", recipe, *args])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


def test_help_explains_every_option(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        c.parse_args(["--config", recipe, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--config" in text
    for option in ("--model.conditioning", "--train.batch-size", "--optim.ema-decay"):
        assert option in text
    assert "Global batch size" in text


def test_a_recipe_must_exist_and_define_config(tmp_path):
    with pytest.raises(c.ConfigError, match=r"nowhere\.py, which is not a file"):
        c.load(tmp_path / "nowhere.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(c.ConfigError, match=r"empty\.py defines config = None"):
        c.load(tmp_path / "empty.py")
