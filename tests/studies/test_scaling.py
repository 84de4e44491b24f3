"""The scaling study: which runs it is made of, how it goes on, what it says of its measurements."""

import json
import types

import figures
import numpy as np
import pytest

from dit_jax.config import ConfigError
from dit_jax.models import cost


@pytest.fixture
def args(scaling, monkeypatch, tmp_path):
    """The options of a command line."""

    def parse(*given):
        monkeypatch.setattr("sys.argv", ["scaling.py", "--out", str(tmp_path), *given])
        return scaling.options()

    return parse


def test_the_default_is_four_sizes_three_patches_and_four_conditionings_over_three_seeds(scaling, args):
    members = list(scaling.family(args()))
    assert len(members) == len({member.folder for member in members}) == 3 * (4 * 3 + 3)
    first = [member for member in members if member.seed == 0]
    assert first == members[:15]  # every network once, before any twice
    compared = {m.conditioning for m in first if (m.size, m.patch_size) == ("64", 2)}
    assert compared == set(scaling.CONDITIONINGS)


def test_a_conditioning_at_a_size_of_its_own_has_all_four(scaling, args):
    members = list(scaling.family(args("--sizes", "32", "--conditioning-at", "64/2", "--seeds", "1")))
    assert [m.conditioning for m in members if m.size == "64"] == list(scaling.CONDITIONINGS)


def test_networks_of_a_size_differ_in_arithmetic_and_hardly_in_parameters(scaling, args):
    options = args()
    configs = [
        scaling.config_of(scaling.Member("48", patch, "adaln_zero", 1), options) for patch in (4, 2, 1)
    ]
    macs, parameters = (
        [of(config) for config in configs] for of in (cost.forward_macs, cost.parameter_count)
    )
    assert macs[0] < macs[1] / 3 < macs[2] / 9
    assert max(parameters) < 1.1 * min(parameters)
    assert {config.train.seed for config in configs} == {1}


def test_a_letter_is_a_size_of_the_paper(scaling, args):
    member = scaling.Member("B", 4, "adaln_zero", 0)
    config = scaling.config_of(member, args("--config", "configs/dit_xl2_imagenet256.py"))
    assert (config.model.depth, config.model.hidden_size, config.model.patch_size) == (12, 768, 4)


def test_further_options_are_those_of_training(scaling, args, capsys):
    options = args(
        "--config", "configs/dit_xl2_imagenet256.py", "--data.dir", "elsewhere", "--compute.dtype", "bfloat16"
    )
    config = scaling.config_of(scaling.Member("S", 8, "adaln", 2), options)
    assert (config.data.dir, config.compute.dtype, config.model.num_classes) == (
        "elsewhere",
        "bfloat16",
        1000,
    )
    with pytest.raises(SystemExit) as ended:
        args("--sizes", "24", "--no-such-option", "3")
    assert ended.value.code == 2 and "--no-such-option" in capsys.readouterr().err


def test_what_does_not_fit_is_said_before_training(scaling, args):
    with pytest.raises(ConfigError, match="patch"):
        scaling.config_of(scaling.Member("32", 3, "adaln_zero", 0), args())


def test_a_run_is_trained_and_measured_once(scaling, args, monkeypatch):
    options = args("--steps", "4", "--points", "2")
    member, trained, measured = scaling.Member("32", 4, "adaln_zero", 0), [], []

    def train(config):
        trained.append(config)
        (options.out / member.folder).mkdir(exist_ok=True)
        return types.SimpleNamespace(step=4)

    def quality_of(config, step, args):
        measured.append(step)
        if len(measured) == 2 and len(trained) == 1:
            raise KeyboardInterrupt
        return {"distance": 100.0 / step}

    monkeypatch.setattr(scaling, "train", train)
    monkeypatch.setattr(scaling, "quality_of", quality_of)
    with pytest.raises(KeyboardInterrupt):
        scaling.measure(member, options)
    lines = scaling.measure(member, options)
    assert measured == [2, 4, 4] and [line["distance"] for line in lines] == [50.0, 25.0]
    assert scaling.measure(member, options) == lines and len(trained) == 2
    options.samples = 7  # another measurement
    scaling.measure(member, options)
    assert measured[3:] == [2, 4]


def lines_of(macs, distances, parameters=1000):
    return [
        {
            "step": 10 * (i + 1),
            "distance": d,
            "macs": macs,
            "parameters": parameters,
            "training_macs": 3 * macs,
        }
        for i, d in enumerate(distances)
    ]


def test_seeds_are_averaged_and_quality_is_set_against_arithmetic(scaling):
    member = scaling.Member
    found = {
        member("32", 4, "adaln_zero", 0): lines_of(100, [90.0, 60.0]),
        member("32", 4, "adaln_zero", 1): lines_of(100, [110.0, 40.0]),
        member("32", 2, "adaln_zero", 0): lines_of(1000, [40.0, 5.0]),
        member("32", 1, "adaln_zero", 0): lines_of(10000, [3.0, 0.5]),
        member("32", 2, "in_context", 0): lines_of(1100, [70.0, 50.0]),
    }
    small = figures.curves(found)[0]
    np.testing.assert_allclose(small.distance, [100.0, 50.0])
    assert (small.seeds, small.low[-1], small.high[-1]) == (2, 40.0, 60.0)
    text = figures.table(found)
    assert "| 32/4 | 0.00 | 1,000 | 50.0 | 40.0 to 60.0 | - |" in text
    assert "| 32/2 in_context |" in text
    assert "MACs of a forward pass  -1.000" in text  # ten times the arithmetic, a tenth of the distance


def test_the_best_for_a_budget_is_among_those_that_have_not_spent_more():
    curve = figures.Curve("32", 4, "adaln_zero", 1, np.array([10, 20]), np.array([9.0, 8.0]), *[np.zeros(2)] * 2,
                          None, 1, 1, 100)  # fmt: skip
    large = figures.Curve("64", 4, "adaln_zero", 1, np.array([10, 20]), np.array([7.0, 2.0]), *[np.zeros(2)] * 2,
                          None, 4, 4, 200)  # fmt: skip
    found = [line.split() for line in figures.best_for_compute([curve, large], budgets=3)[1:]]
    assert [words[1:] for words in found] == [
        ["32/4", "9.0", "10"],
        ["64/4", "7.0", "10"],
        ["64/4", "2.0", "20"],
    ]


def test_pictures_are_drawn_of_what_there_is(scaling, tmp_path):
    found = {scaling.Member("32", 4, "adaln_zero", 0): lines_of(100, [90.0])}
    figures.draw(found, tmp_path, "digits")
    assert [path.name for path in tmp_path.iterdir()] == ["scaling.png"]
    found[scaling.Member("32", 4, "adaln", 0)] = lines_of(100, [95.0])
    figures.draw(found, tmp_path, "digits")
    assert (tmp_path / "conditioning.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_of_another_choice_of_samples_does_not_count(scaling, args):
    options = args("--steps", "4", "--points", "1", "--only-draw")
    folder = options.out / "32_4_adaln_zero_seed0"
    folder.mkdir()
    line = {"step": 4, "samples": 1000, "sampler": "ddpm", "sampling_steps": 8, "distance": 1.0}
    (folder / "quality.jsonl").write_text(json.dumps(line) + "\n")
    assert scaling.measure(scaling.Member("32", 4, "adaln_zero", 0), options) == []
