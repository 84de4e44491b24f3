"""The referee of pictures of two digits."""

import numpy as np
import pytest

from dit_jax.config import ConfigError
from dit_jax.data import digits_text
from dit_jax.evaluation.digits_text import agreement, facts_of, prompts, report
from dit_jax.evaluation.samples import Provenance, save_samples


@pytest.fixture(scope="module")
def real():
    return digits_text.make(400, 3, "test")


def test_every_caption_says_its_facts(real):
    for caption in range(digits_text.CAPTIONS):
        np.testing.assert_array_equal(facts_of([words[caption] for words in real.captions]), real.facts)
    with pytest.raises(ConfigError, match="'a cat'; expected two digits, such as"):
        facts_of(["a cat"])


def test_real_pictures_are_read_as_their_captions_say(real):
    right = agreement(real.images, real.facts)
    assert right.mean() > 0.96
    assert agreement(real.images[:, ::-1, ::-1], real.facts).mean() < 0.2


@pytest.mark.parametrize("change", ["first", "second", "relation", "order"])
def test_a_wrong_digit_or_place_is_seen(real, change):
    facts = real.facts.copy()
    if change == "order":
        facts = facts[facts[:, 0] != facts[:, 1]]
        images = real.images[real.facts[:, 0] != real.facts[:, 1]]
        assert agreement(images, facts[:, [1, 0, 2]]).mean() < 0.03
        return
    column = ("first", "second", "relation").index(change)
    facts[:, column] = (facts[:, column] + 1) % (2 if change == "relation" else 10)
    assert agreement(real.images, facts).mean() < 0.1


def test_prompts_show_all_pairs_and_a_tenth_of_them_is_new(data_dir):
    asked = prompts(500)
    facts = facts_of(asked)
    assert len({tuple(fact) for fact in facts.tolist()}) == 200
    held = digits_text.held_out_pairs()
    assert 45 <= sum((a, b) in held for a, b, _ in facts.tolist()) <= 55
    shipped = data_dir.parent.parent / "dit_jax" / "assets" / "digits_text_prompts.txt"
    assert shipped.read_text().splitlines() == asked


def test_the_command_reports_files_of_captions(real, tmp_path, capsys):
    from dit_jax.commands.evaluate import main

    captions = [words[0] for words in real.captions]
    file = tmp_path / "samples.npz"
    wrong = np.where(np.arange(len(captions))[:, None, None, None] < 100, 0, real.images).astype(np.uint8)
    save_samples(file, wrong, None, Provenance(prompts=captions), captions)
    assert main("evaluate.py", ["--npz", str(file)]) == 0
    said = capsys.readouterr().out
    share = agreement(wrong, real.facts).mean()
    assert 0.6 < share < 0.8
    assert f"the caption says   {share:.1%}" in said and "never showed together" in said
    save_samples(file, real.images[:2], None, Provenance(prompts=["x"]), ["a cat", "a dog"])
    assert main("evaluate.py", ["--npz", str(file)]) == 2
    assert "'a cat'; expected two digits" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"shape \(2, 32, 32, 3\) and 2 captions; expected 64x64"):
        report(np.zeros((2, 32, 32, 3), np.uint8), captions[:2])
