"""sample.py with gs:// and s3://: the files and parts that it leaves are those that it leaves on a disk."""

import io
import json
import shutil

import numpy as np
import pytest

from dit_jax import leases, paths, signals
from dit_jax.commands import sample as sample_command
from dit_jax.config import ConfigError
from dit_jax.generation import command, scoring
from dit_jax.generation.command import SampleArgs
from dit_jax.generation.editing import read_picture, strip_of
from dit_jax.generation.parts import Parts, parts_of
from dit_jax.generation.scoring import ScoreArgs
from dit_jax.interop.weights import Reading
from dit_jax.pictures import save_grid
from dit_jax.runs.convert import convert
from dit_jax.text.prompt_sets import read_prompts

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
FEW = {"num_samples": 44, "steps": 2, "batch_size": 16}  # as in test_stream.py, whose programs these are


def draw(run, npz, **options):
    return command.main(SampleArgs(workdir=str(run), npz=str(npz), **FEW | options))


def arrays_of(file):
    with np.load(io.BytesIO(paths.to_path(file).read_bytes())) as found:
        return dict(found)


class Killed(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("kind", ["google", "amazon"])
def test_samples_go_on_in_a_bucket_and_are_those_of_a_disk(kind, request, tiny_run, tmp_path, monkeypatch):
    folder = f"{request.getfixturevalue(kind).bucket()}/drawn"
    npz, grid = f"{folder}/s.npz", f"{folder}/s.png"
    kept, put = [], Parts.put

    def once(self, start, arrays):
        if kept:
            raise Killed
        kept.append(start)
        put(self, start, arrays)

    monkeypatch.setattr(Parts, "put", once)
    with pytest.raises(Killed):
        draw(tiny_run, npz, out=grid)
    assert [name for name in paths.names_in(parts_of(npz)) if name.endswith(".npz")] == [
        "0000000000-0000000016.npz"
    ]
    monkeypatch.setattr(
        Parts, "put", lambda self, start, arrays: (kept.append(start), put(self, start, arrays))
    )
    with pytest.raises(ConfigError, match=r"s.npz.parts holds samples with seed 0, not 1"):
        draw(tiny_run, npz, out=grid, seed=1)
    assert draw(tiny_run, npz, out=grid) == 0 and kept == [0, 16, 32]
    assert list(paths.files_below(paths.to_path(folder))) == ["s.npz", "s.png"]
    assert draw(tiny_run, tmp_path / "s.npz", out=str(tmp_path / "s.png")) == 0
    there, here = arrays_of(npz), arrays_of(tmp_path / "s.npz")
    assert there.keys() == here.keys()
    for name in here:
        np.testing.assert_array_equal(there[name], here[name])
    assert paths.to_path(grid).read_bytes() == (tmp_path / "s.png").read_bytes()


@pytest.mark.parametrize("kind", ["google", "amazon"])
def test_a_run_in_a_bucket_is_measured_as_on_a_disk(kind, request, tiny_run, tmp_path):
    folder = paths.to_path(f"{request.getfixturevalue(kind).bucket()}/run")
    run = shutil.copytree(tiny_run, tmp_path / "run")  # results are written there
    convert(str(run), str(folder), "run", Reading())
    here, there = (
        scoring.main(ScoreArgs(workdir=str(place), **FEW | {"cfg_scale": [1.5]}))[0]
        for place in (run, folder)
    )
    assert there.metrics == here.metrics
    (line,) = paths.read_bytes(folder / scoring.FILE).splitlines()
    assert json.loads(line)["metrics"] == here.metrics and scoring.FOLDER not in paths.names_in(folder)


def test_one_command_at_a_time_fills_the_parts(google, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.05)
    folder = parts_of(f"{google.bucket()}/s.npz")
    ended = []
    monkeypatch.setattr(signals, "end", lambda code, why: ended.append((code, why)))
    with Parts("--npz", folder, {"seed": 0}, 4) as first:
        first.put(0, {"images": np.zeros((2, 1))})
        with pytest.raises(
            ConfigError, match=r"--npz: another command is filling gs://.*s.npz.parts; expected"
        ):
            Parts("--npz", folder, {"seed": 0}, 4)
        with google.failing(status=403), pytest.raises(OSError, match=r"cannot be written to .* refuses"):
            first.put(2, {"images": np.zeros((2, 1))})
        contents = google.failing(lambda _, path: "alt=media" in path, status=403)
        with contents, pytest.raises(OSError, match=r"refuses"):  # not "remove it"
            list(first.read())
        monkeypatch.setattr(leases, "_is_free", lambda *_: True)  # as if it had slept
        with Parts("--npz", folder, {"seed": 0}, 4) as second:
            assert second.missing == [(2, 4)]
            for _ in range(400):
                if ended:
                    break
                leases.time.sleep(0.05)
            second.put(2, {"images": np.ones((2, 1))})
            assert [len(part["images"]) for part in second.read()] == [2, 2]
            second.remove()
    assert [code for code, _ in ended] == [1] and "another process has taken over" in ended[0][1]
    with Parts("--npz", folder, {"seed": 1}, 4) as fresh:
        fresh.remove()
    assert paths.files_below(folder) == {}


def test_what_a_command_reads_may_lie_in_a_bucket(google, tiny_run):
    folder = paths.to_path(f"{google.bucket()}/in")
    for name, text in (("b.txt", "a hat\r\n"), ("a.txt", "a cat\n"), ("c.jsonl", '{"prompt": "x"}\n')):
        (folder / "prompts" / name).write_bytes(text.encode())
    assert read_prompts("--prompts", str(folder / "prompts")).captions == ("a cat", "a hat")
    assert read_prompts("--prompts", str(folder / "prompts" / "c.jsonl")).captions == ("x",)
    with pytest.raises(ConfigError, match=r"--prompts is 'gs://.*/none.txt', which cannot be read"):
        read_prompts("--prompts", str(folder / "none.txt"))
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    save_grid(folder / "x.png", picture)
    np.testing.assert_array_equal(read_picture("--init-image", str(folder / "x.png"), 64), picture[0])
    with pytest.raises(ConfigError, match=r"--init-image names gs://.*none.png, which is no picture"):
        read_picture("--init-image", str(folder / "none.png"), 64)
    assert str(strip_of(f"{folder}/way.gif")) == f"{folder}/way_strip.png"
    with pytest.raises(ConfigError, match=r"--out and --npz are both gs://"):
        draw(tiny_run, f"{folder}//x.npz", out=f"{folder}/x.npz")
    for place in (folder, folder.parent):  # a bucket has no file's name
        with pytest.raises(ConfigError, match=r"--npz is 'gs://.*', which is a folder; expected a file"):
            draw(tiny_run, place)


def test_what_a_store_refuses_is_one_sentence_and_exit_code_1(google, tiny_run, capsys):
    bucket = google.bucket()
    args = ["--workdir", str(tiny_run), "--num-samples", "1", "--steps", "2", "--out", f"{bucket}/x.png"]
    refused = google.failing(lambda method, path: method == "POST" and "x.png" in path, status=403)
    with refused:
        assert sample_command.main("sample.py", args) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("sample.py: ") and "the store refuses or does not answer" in said[-1]
    assert "Traceback" not in "".join(said)
    assert sample_command.main("sample.py", [*args, "--config", "gs://b/x.py", "--from", "x.pt"]) == 2
    assert "--config names gs://b/x.py; expected a recipe on a disk" in capsys.readouterr().err
