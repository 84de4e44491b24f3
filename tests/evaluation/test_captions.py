"""Samples beside their captions: the CLIP score as transformers computes it, the folders of benchmarks."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from dit_jax.commands import evaluate
from dit_jax.config import ConfigError
from dit_jax.evaluation.captions import clip_score, write_layout
from dit_jax.evaluation.samples import Provenance, save_samples
from dit_jax.text.clip import Clip
from dit_jax.text.prompt_sets import read_prompts

CAPTIONS = ["a photo of a bench", "two dogs", "a red car, left of a cow", "seven"]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (8, 24, 40, 3), np.uint8)


@pytest.fixture
def npz(images, tmp_path):
    (tmp_path / "run").mkdir()
    save_samples(
        tmp_path / "s.npz", images, None, Provenance(run=str(tmp_path / "run"), step=7), CAPTIONS * 2
    )
    return str(tmp_path / "s.npz")


@pytest.fixture(scope="module")
def folder(sd3_folder, peers, tmp_path_factory):
    """A tiny CLIP with random weights, as transformers writes one."""
    torch = peers[0]
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra: text)")
    out = tmp_path_factory.mktemp("clip") / "clip"
    shutil.copytree(pathlib.Path(sd3_folder) / "tokenizer", out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    sizes = dict(
        hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, projection_dim=24
    )
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=sizes | dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id),
        vision_config=sizes | dict(image_size=32, patch_size=8), projection_dim=24,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps({
        "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}, "resample": 3,
        "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.27, 0.28],
    }))  # fmt: skip
    return str(out)


def test_the_clip_score_is_that_of_transformers(folder, images, peers):
    """Pictures through its own preprocessing, pictures and captions through the whole model."""
    import transformers

    torch, captions = peers[0], CAPTIONS * 2
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor_class = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = processor_class.from_pretrained(folder)
    with torch.no_grad():
        out = model(
            pixel_values=torch.tensor(np.stack(processor(list(images)).pixel_values)),
            **tokenizer(captions, padding=True, return_tensors="pt"),
        )  # fmt: skip
    expected = 100 * np.maximum((out.image_embeds * out.text_embeds).sum(-1).numpy(), 0)
    found = clip_score(images, captions, Clip.opened(folder))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    assert found.std() > 0.1


def test_the_command_prints_it_and_keeps_where_it_came_from(folder, npz, tmp_path, capsys):
    assert evaluate.main("evaluate.py", ["--npz", npz, "--clip", folder]) == 0
    said = capsys.readouterr().out
    line = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())
    assert f"CLIP score {line['metrics']['clip_score']:.2f} " in said and "8 pictures" in said
    assert line["step"] == 7 and line["weights_hash"] == Clip.opened(folder).fingerprint


def geneval(tmp_path):
    records = [
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": text} for text in CAPTIONS
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(tmp_path / "metadata.jsonl"), records


def test_genevals_folders(npz, images, tmp_path):
    prompts, records = geneval(tmp_path)
    assert read_prompts("--prompts", prompts).captions == tuple(CAPTIONS)
    assert (
        evaluate.main("evaluate.py", ["--npz", npz, "--prompts", prompts, "--layout", str(tmp_path / "g")])
        == 0
    )
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == ["00000", "00001", "00002", "00003"]
    for number, record in enumerate(records):
        folder = tmp_path / "g" / f"{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == record
        for i, name in enumerate(sorted(path.name for path in (folder / "samples").iterdir())):
            assert name == f"{i:04d}.png"
            np.testing.assert_array_equal(
                np.asarray(Image.open(folder / "samples" / name)), images[number + 4 * i]
            )


def test_dpgs_pictures(images, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, caption in (("stanford_3", "a dog"), ("COCOval_1", "a cat\n")):
        (folder / f"{name}.txt").write_text(caption)
    save_samples(tmp_path / "s.npz", images, None, None, ["a cat", "a dog"] * 4)
    write_layout(str(tmp_path / "s.npz"), str(folder), str(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["COCOval_1.png", "stanford_3.png"]
    found = np.asarray(Image.open(tmp_path / "out" / "stanford_3.png"))
    assert found.shape == (48, 80, 3)
    for i, (top, left) in enumerate([(0, 0), (0, 40), (24, 0), (24, 40)]):
        np.testing.assert_array_equal(found[top : top + 24, left : left + 40], images[1 + 2 * i])


def test_what_does_not_fit_is_refused(npz, images, tmp_path, capsys):
    prompts, _ = geneval(tmp_path)
    (tmp_path / "lines.txt").write_text("\n".join(CAPTIONS))
    (tmp_path / "three.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in CAPTIONS[:3]))
    (tmp_path / "order.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in CAPTIONS[::-1]))
    (tmp_path / "none.jsonl").write_text('{"text": "a dog"}\n')
    for place, message in (
        (tmp_path / "lines.txt", "expected GenEval's records"),
        (tmp_path / "three.jsonl", "has 8 samples; expected as many for each of 3 prompts"),
        (tmp_path / "order.jsonl", "sample 0 shows 'a photo of a bench'; expected 'seven', as"),
        (tmp_path / "none.jsonl", "record 1 has no prompt"),
        (tmp_path / "run", "holds no prompt"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_layout(npz, str(place), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"--layout is .*, which exists; expected a new folder"):
        write_layout(npz, prompts, str(tmp_path / "run"))
    save_samples(tmp_path / "labels.npz", images, np.zeros(8, int))
    for args, message in (
        (["--npz", npz, "--layout", "x"], "--prompts and --layout go together"),
        (["--npz", str(tmp_path / "labels.npz"), "--clip", "x"], "whose captions cannot be read"),
        (["--npz", npz, "--clip", str(tmp_path / "run")], "has no model.safetensors"),
    ):
        assert evaluate.main("evaluate.py", args) == 2
        assert message in capsys.readouterr().err
