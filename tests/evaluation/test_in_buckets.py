"""evaluate.py with gs:// and s3://: samples, references and results."""

import json
from concurrent import futures

import numpy as np
import pytest

from dit_jax import leases, paths
from dit_jax.commands import evaluate as command
from dit_jax.config import ConfigError
from dit_jax.data.digits import load_digits
from dit_jax.evaluation import captions
from dit_jax.evaluation.metrics import append_line
from dit_jax.evaluation.report import evaluate_file
from dit_jax.evaluation.samples import Provenance, load_prompts, save_samples
from dit_jax.files import whole_file, write_whole

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DIT_JAX_INCEPTION", raising=False)


@pytest.mark.parametrize("kind", ["google", "amazon"])
def test_samples_and_their_reference_in_a_bucket_give_what_they_give_on_a_disk(
    kind, request, tmp_path, capsys
):
    folder = f"{request.getfixturevalue(kind).bucket()}/x"
    images, labels = load_digits("test")
    for place in (folder, str(tmp_path)):
        save_samples(f"{place}/s.npz", images[:40], labels[:40], Provenance(run=f"{place}/run", step=3))
        write_whole(f"{place}/run/config.json", "{}")
        with whole_file(f"{place}/ref.npz") as here, here.open("wb") as file:
            np.savez(file, arr_0=np.broadcast_to(images[50:90], (40, 32, 32, 3)))
    here = evaluate_file(f"{tmp_path}/s.npz", f"{tmp_path}/ref.npz", "digits")
    args = ["--npz", f"{folder}/s.npz", "--reference", f"{folder}/ref.npz", "--features", "digits"]
    assert command.main("evaluate.py", [*args, "--out", f"{folder}/found.json"]) == 0
    assert here.table() in capsys.readouterr().out
    evaluate_file(f"{folder}/s.npz", f"{folder}/ref.npz", "digits")
    lines = paths.to_path(f"{folder}/run/evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["metrics"] for line in lines] == [here.metrics] * 2
    assert paths.to_path(f"{folder}/found.json").read_text() == lines[0] + "\n"


def test_what_is_not_in_the_bucket_or_is_refused_is_one_sentence(google, capsys):
    folder = f"{google.bucket()}/x"
    for args, message in (
        (["--npz", f"{folder}/s.npz"], f"--npz names {folder}/s.npz, whose provenance cannot be read"),
        (
            ["--npz", "x.npz", "--reference", f"{folder}/r"],
            f"--reference is {folder}/r, where there is nothing",
        ),
        (["--likelihood", "--workdir", folder], f"--workdir is {folder}, which has no config.json"),
    ):
        assert command.main("evaluate.py", args) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"evaluate.py: {message}") and said.count("\n") == 1
    with google.failing(status=403), pytest.raises(OSError, match="the store refuses"):  # not "nothing there"
        command.main("evaluate.py", ["--npz", "x.npz", "--reference", f"{folder}/r"])
    with google.failing(status=403):
        append_line(paths.to_path(f"{folder}/evaluations.jsonl"), "{}")
    assert "evaluations.jsonl cannot be written (" in capsys.readouterr().err


def test_of_two_commands_at_once_none_loses_its_line(store, monkeypatch):
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.05)
    file = paths.to_path(f"{store.bucket()}/run/evaluations.jsonl")
    write_whole(file, "before\n")
    slow = store.failing(
        lambda method, path: method != "GET" and "evaluations.jsonl" in path and ".lock" not in path,
        seconds=0.5,
    )
    with slow, futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda line: append_line(file, line), "ab"))
    assert sorted(file.read_text().splitlines()) == ["a", "b", "before"]


def test_a_benchmarks_layout_in_a_bucket(google):
    folder = f"{google.bucket()}/x"
    for name, text in (("a", "a cat"), ("b", "a hat")):
        write_whole(f"{folder}/prompts/{name}.txt", text)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    save_samples(f"{folder}/s.npz", images, None, None, ["a cat", "a hat"])
    assert load_prompts(f"{folder}/s.npz") == ["a cat", "a hat"]
    captions.write_layout(f"{folder}/s.npz", f"{folder}/prompts", f"{folder}/out")
    assert paths.names_in(paths.to_path(f"{folder}/out")) == ["a.png", "b.png"]
    with pytest.raises(ConfigError, match=r"--layout is gs://.*/out, which exists"):
        captions.write_layout(f"{folder}/s.npz", f"{folder}/prompts", f"{folder}/out")
