"""Configs: parsing, resolution, one clear error for everything wrong."""

import dataclasses
import json
import os
import pathlib
import re

import pytest

from dit_jax import config as c
from dit_jax.diffusion.create import create_process
from dit_jax.models.create import build_model

ROOT = pathlib.Path(__file__).parent.parent

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
        ("[]", r"the config is \[\]; input should be an object"),
        ("null", "the config is None"),
        ('{"model": []}', r"--model is \[\]; input should be an object"),
        ('{"model": null}', "--model is None"),
        ('{"model": {"input_size": 8}}', "--model.input-size is 8; input should be a valid array"),
        ('{"model": {"input_size": [8]}}', "--model.input-size.1 is .*; field required"),
        ('{"model": {"depth": true}}', "--model.depth is True; input should be a valid integer"),
        ('{"model": {"depth": 2.5}}', "--model.depth is 2.5"),
        ('{"optim": {"eps": NaN}}', "--optim.eps is nan; input should be a finite number"),
        ('{"optim": {"eps": 1e400}}', "--optim.eps is inf; input should be a finite number"),
        (
            '{"optim": {"ema_more": [0.9, Infinity]}}',
            "--optim.ema-more.1 is inf; input should be a finite number",
        ),
        pytest.param(
            '{"train": {"steps": 1' + "0" * 5000 + "}}",
            "the config is .{,100}; invalid json: number out of range",
            id="digits",
        ),
        pytest.param("[" * 100_000, "the config is .{,100}; invalid json", id="nested"),
        ('{"train": {"workdir": "\\ud800"}}', "the config is .{,100}; invalid json"),
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
        ({"depth": 10**9}, "--model.depth is 1000000000; expected at most 10000"),
        ({"name": "DiT-S/" + "9" * 5000}, "--model.name is 'DiT-S/9.{,100}; expected DiT"),
        ({"mlp_ratio": 0.0001}, "--model.mlp-ratio is 0.0001; expected a hidden layer: 1 / 1152"),
        ({"mlp_ratio": float("inf")}, "--model.mlp-ratio is inf; input should be a finite number"),
        (
            {"input_size": (2**20, 2**20)},
            r"--model.input-size is \(1048576, 1048576\); expected fewer than 2\^31 numbers",
        ),
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
        (["--compute.unroll"], True),
        (["--compute.no-unroll"], False),
    ],
)
def test_unroll_is_a_switch_and_a_choice_of_three(recipe, args, unroll):
    assert c.parse_args(["--config", recipe, *args]).compute.unroll is unroll


def test_unroll_is_read_from_configs_of_before_and_refused_in_one_sentence(recipe, capsys):
    for value in (True, False, "auto"):
        text = c.to_json(c.Config(compute=c.ComputeConfig(unroll=value)))
        assert c.from_json(text).compute.unroll is value
    for value in ('"on"', "2", "null"):
        with pytest.raises(c.ConfigError, match=r"--compute.unroll is .*; input should be"):
            c.from_json(f'{{"model": {{"unroll": {value}}}}}')
    with pytest.raises(SystemExit) as stop:
        c.parse_args(["--config", recipe, "--model.unroll", "on"])
    assert stop.value.code == 2
    assert "--compute.unroll" in capsys.readouterr().err


def test_options_of_earlier_versions_are_those_of_today(recipe):
    old = [
        "--model.dtype",
        "bfloat16",
        "--model.norm_kernel=pallas",
        "--model.remat",
        "dots",
        "--model.depth",
        "5",
    ]
    config = c.parse_args(["--config", recipe, *old])
    assert (config.compute.dtype, config.compute.norm_kernel, config.compute.remat) == (
        "bfloat16",
        "pallas",
        "dots",
    )
    assert config.model.depth == 5


def test_a_config_of_the_first_version_is_read_as_one_of_today():
    of_today = c.Config(
        model=c.ModelConfig(depth=3), compute=c.ComputeConfig(dtype="bfloat16", attention="xla")
    )
    groups = json.loads(c.to_json(of_today))
    assert groups.pop("version") == 2
    groups["model"] |= groups.pop("compute")
    assert c.from_json(json.dumps(groups)) == of_today
    assert c.from_json(c.to_json(of_today)) == of_today


@pytest.mark.parametrize("version", [0, 99, "2", True, None])
def test_a_config_of_an_unknown_version_is_refused(version):
    with pytest.raises(
        c.ConfigError, match=f"version is {version}; expected 1 to 2, the newest that this dit_jax"
    ):
        c.from_json(json.dumps({"version": version}))


def test_a_recipe_of_before_is_told_where_an_option_is_now(tmp_path):
    path = tmp_path / "old.py"
    path.write_text("from dit_jax.config import *\nconfig = Config(model=ModelConfig(dtype='bfloat16'))\n")
    with pytest.raises(c.ConfigError, match=r"in line 2.*; dtype is an option of compute=ComputeConfig"):
        c.load(path)


NUMBERS = [
    (f"{group.name}.{option.name}", option.type)
    for group in dataclasses.fields(c.Config)
    for option in dataclasses.fields(group.default_factory)
    if re.search("int|float", option.type)
]


@pytest.mark.parametrize(("option", "kind"), NUMBERS)
def test_no_number_is_more_than_a_run_can_compute_with(option, kind):
    group, name = option.split(".")
    part = getattr(c.Config(), group)
    floats = (float("nan"), float("inf"), float("-inf"), 1e39, 1e-40) if "float" in kind else ()
    for value in (*floats, 10**40, -(10**40), 10**5000):
        given = (value, value) if "tuple" in kind else value
        config = dataclasses.replace(c.Config(), **{group: dataclasses.replace(part, **{name: given})})
        pattern = f"^(--(mesh|{option.replace('_', '-')})[ .].*|the config cannot be written as JSON .*)$"
        with pytest.raises(c.ConfigError, match=pattern) as refused:
            c.resolve(config)
        assert len(str(refused.value)) < 250


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            c.Config(train=c.TrainConfig(workdir="")),
            "--train.workdir is empty; expected the folder of the run",
        ),
        (c.Config(train=c.TrainConfig(workdir="a\0b")), r"--train.workdir is 'a\\x00b'; expected text"),
        (
            c.Config(data=c.DataConfig(vae="caf\udce9")),
            r"--data.vae is 'caf\\udce9'; expected text that is UTF-8",
        ),
        (c.Config(optim=c.OptimConfig(b2=1 - 1e-12)), "--optim.b2 is 0.999999999999; .* below 1 in float32"),
        (c.Config(model=None), "--model is None; input should be an object"),
        (
            c.Config(model=c.ModelConfig(depth={3})),
            r"cannot be written as JSON \(.*set.*\); expected plain values",
        ),
    ],
)
def test_values_that_a_run_cannot_use_are_refused(config, message):
    with pytest.raises(c.ConfigError, match=message):
        c.resolve(config)


def test_values_get_the_types_that_are_declared():
    resolved = c.resolve(
        c.Config(model={"name": "DiT-S/2", "input_size": [8, 8]}, optim=c.OptimConfig(eps=1))
    )
    assert resolved == c.resolve(
        c.Config(model=c.ModelConfig(name="DiT-S/2", input_size=(8, 8)), optim=c.OptimConfig(eps=1.0))
    )


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
    with pytest.raises(c.ConfigError, match="which is not a file"):
        c.load(tmp_path)
    (tmp_path / "dangling.py").symlink_to(tmp_path / "gone.py")
    os.mkfifo(tmp_path / "fifo.py")
    for name in ("dangling.py", "fifo.py", "x" * 5000, "", "a\0b"):
        with pytest.raises(c.ConfigError, match="which is not a file"):
            c.load(name if "." not in name else tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.py", b"x = 1\n", r"empty\.py defines config = None"),
        ("README.md", b"# A title\n\nSome words\n", r"does not run as a recipe \(SyntaxError: .*line 3\)"),
        ("a.py", b"import json\nconfig = json.loads('x')\n", r"\(JSONDecodeError in line 2: Expecting value"),
        (
            "a.py",
            b"from dit_jax.config import ModelConfig\nModelConfig(dept=3)",
            r"TypeError in line 2: .*'dept'",
        ),
        ("a.py", b"import sys\nsys.exit('no')\n", r"\(SystemExit in line 2: no\)"),
        ("a.py", b"\0\xff", r"does not run as a recipe \(SyntaxError"),
        ("a.json", b"\xff\xfe", r"a\.json, which cannot be read: .*utf-8"),
        ("a.json", b'{"model": {"depth": "3"}}', r"a\.json, which cannot be read: --model.depth is '3'"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(c.ConfigError, match=message) as refused:
        c.load(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    recipes = c.load("configs/digits.py"), c.load("configs/dit_b2_imagenet256.py")
    monkeypatch.chdir(tmp_path)
    assert (c.load("configs/digits.py"), c.load("configs/dit_b2_imagenet256.py")) == recipes
    assert c.parse_args([]).train.workdir == "runs/digits"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").write_text(RECIPE)  # what lies in the working directory comes first
    assert c.parse_args([]).train.seed == 3


# ------------------------------------------------------------------------------------------------- kinds


def flow(**options):
    return c.resolve(c.Config(diffusion=c.FlowMatchingConfig(**options)))


def test_a_saved_config_tells_its_kinds():
    config = flow(path="gvp", shift=3.0)
    saved = json.loads(c.to_json(config))
    assert (saved["diffusion"]["kind"], saved["model"]["kind"]) == ("flow", "dit")
    assert c.from_json(json.dumps(saved)) == config
    assert c.ModelConfig is c.DiTConfig and c.DiffusionConfig is c.GaussianConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "nope"}, "--diffusion.kind is 'nope'; expected gaussian or flow"),
        ({"kind": 3}, "--diffusion.kind is .*; expected gaussian or flow"),
        ({"kind": None}, "--diffusion.kind is .*; expected gaussian or flow"),
        (
            {"kind": "gaussian"},
            "--diffusion.prediction is 'velocity'; input should be 'epsilon', 'x0' or 'v'",
        ),
        ({"schedule": "linear"}, "unknown option 'diffusion.schedule'"),
        ({"path": "cubic"}, "--diffusion.path is 'cubic'; input should be 'linear', 'gvp' or 'vp'"),
        ({"shift": "3"}, "--diffusion.shift is '3'; input should be a valid number"),
    ],
)
def test_kinds_that_there_are_not_and_options_of_another(change, message):
    saved = json.loads(c.to_json(flow()))
    saved["diffusion"] |= change
    with pytest.raises(c.ConfigError, match=message):
        c.from_json(json.dumps(saved))


def test_a_kind_that_is_missing_or_of_no_network():
    saved = json.loads(c.to_json(flow()))
    with pytest.raises(c.ConfigError, match=r"--diffusion.kind is missing; expected gaussian or flow"):
        c.from_json(json.dumps(saved | {"diffusion": {"path": "gvp"}}))
    with pytest.raises(c.ConfigError, match=r"--model.kind is 'unet'; expected dit or mmdit"):
        c.from_json(json.dumps(saved | {"model": {"kind": "unet"}}))
    before = c.from_json(
        '{"model": {"depth": 3}, "diffusion": {"prediction": "v"}}'
    )  # said no version, and no kind
    assert before.diffusion == c.GaussianConfig(prediction="v")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 0.0}, "--diffusion.shift is 0.0; expected a number above 0"),
        ({"logit_std": -1.0}, "--diffusion.logit-std is -1.0; expected a number above 0"),
        ({"time_scale": 0.0}, "--diffusion.time-scale is 0.0; expected a number above 0"),
        ({"mode_scale": 2.0}, "--diffusion.mode-scale is 2.0; expected -1 to 1.7519"),
        ({"cosine_weight": -1.0}, "--diffusion.cosine-weight is -1.0; expected 0 or more"),
        ({"sample_eps": 0.5}, "--diffusion.sample-eps is 0.5; expected at least 0 and below 0.5"),
        ({"loss_weight": "likelihood"}, "--diffusion.loss-weight is likelihood; expected none, or another"),
    ],
)
def test_flow_matching_that_could_not_train_is_refused(options, message):
    with pytest.raises(c.ConfigError, match=message):
        flow(**options)
    flow(loss_weight="likelihood", prediction="noise")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("None", "--diffusion is None"),
        ("ModelConfig()", "--diffusion.kind is 'dit'; expected gaussian or flow"),
        ("FlowMatchingConfig(kind='gaussian')", "--diffusion.prediction is 'velocity'; input should be"),
        ("FlowMatchingConfig(path=3)", "--diffusion.path is 3; input should be"),
        ("FlowMatchingConfig", "the config cannot be written as JSON"),
    ],
)
def test_a_recipe_whose_process_is_none_is_told_in_one_sentence(tmp_path, given, message):
    path = tmp_path / "recipe.py"
    path.write_text(f"from dit_jax.config import *\nconfig = Config(diffusion={given})\n")
    with pytest.raises(c.ConfigError, match=message):
        c.parse_args(["--config", str(path)])


def test_the_recipe_chooses_the_kind_and_its_options(recipe, tmp_path, capsys):
    of_flow = tmp_path / "flow.py"
    of_flow.write_text(
        "from dit_jax.config import *\nconfig = Config(diffusion=FlowMatchingConfig(path='gvp'))\n"
    )
    args = ["--config", str(of_flow), "--diffusion.shift", "3", "--diffusion.kind", "flow"]
    assert c.parse_args(args).diffusion == c.FlowMatchingConfig(path="gvp", shift=3.0)
    assert c.parse_args(["--config", recipe, "--diffusion.kind=gaussian"]).diffusion == c.GaussianConfig()
    for path, own, other in ((of_flow, "flow", "gaussian"), (recipe, "gaussian", "flow")):
        with pytest.raises(
            c.ConfigError, match=f"--diffusion.kind is {other}; the recipe .* is of kind {own}"
        ):
            c.parse_args(["--config", str(path), f"--diffusion.kind={other}"])
    for path, option, other in ((of_flow, "shift", "num-timesteps"), (recipe, "num-timesteps", "shift")):
        with pytest.raises(SystemExit):
            c.parse_args(["--config", str(path), "--help"])
        shown = capsys.readouterr().out
        assert f"--diffusion.{option}" in shown and f"--diffusion.{other}" not in shown
        with pytest.raises(SystemExit) as stop:
            c.parse_args(["--config", str(path), f"--diffusion.{other}", "3"])
        assert stop.value.code == 2
        capsys.readouterr()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_builds_its_network_and_process(path):
    config = c.resolve(c.load(path))
    process, model = create_process(config.diffusion), build_model(config)
    assert process.loss_names[0] == "loss"
    assert model.out_channels == config.model.in_channels * (2 if config.diffusion.learn_sigma else 1)
    assert config.train.workdir == f"runs/{path.stem}"
