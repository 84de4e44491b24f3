"""Weights out of checkpoints: what is read of them, for which network, and what a fine-tuned run takes over."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import tensorstore as ts

from dit_jax import processes
from dit_jax.config import ConfigError, to_json
from dit_jax.data.metadata import METADATA_FILE
from dit_jax.generation.command import load_run
from dit_jax.models.create import build_model, init_params
from dit_jax.runs import checkpoint, snapshots
from dit_jax.runs.checkpoint import CheckpointError
from dit_jax.runs.weights import load_weights, save_weights, shared_rows
from dit_jax.training.loop import train


@pytest.fixture(scope="module")
def trained(tiny, latents, tmp_path_factory):
    """(folder of a run whose checkpoint of step 2 has four averages, its config, its state): the first is 1 off."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    config = tiny.config(optim={"ema_more": (0.9, 0.99, 0.999)})
    fresh = tiny.run(config, 1, 0)[0]
    ema = tuple(jax.tree.map(lambda x, i=i: x + i, fresh.params) for i in range(1, 5))
    state = dataclasses.replace(fresh, step=fresh.step + 2, ema=ema)
    with checkpoint.Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(state, {"config": {}, "dataset": ""}, 1.0)
    (folder / "config.json").write_text(to_json(config))
    shutil.copy(latents / METADATA_FILE, folder / "dataset.json")
    return folder, config, state


def layout(config):
    """The parameters of a config, to be restored onto one device."""
    shapes = jax.eval_shape(lambda key: init_params(build_model(config), config, key), jax.random.key(0))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), shapes)


def bytes_read():
    """What TensorStore has read from files in this process."""
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for value in metric["values"])


def same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_only_what_is_asked_for_is_read_and_hashed(trained, monkeypatch):
    folder, config, state = trained
    opened = []
    digest = checkpoint.hashlib.file_digest
    monkeypatch.setattr(
        checkpoint.hashlib, "file_digest", lambda file, name: opened.append(file.name) or digest(file, name)
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    for kind, expected in (("ema", state.ema[0]), ("params", state.params)):
        opened.clear()
        before = bytes_read()
        weights, step = load_weights(folder / "checkpoints", layout(config), config, kind)
        assert step == 2
        same_bits(weights, expected)
        assert bytes_read() - before < 2 * size, "other averages are read"
        assert opened and all(f"/2/{kind}/" in name for name in opened)


def test_another_process_leaves_the_hashing_to_the_first(trained, monkeypatch):
    folder, _, _ = trained
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    said = iter(["", "a file is missing"])  # by process 0

    class Store:
        def blocking_key_value_get(self, key, timeout_ms):
            return json.dumps({"result": next(said)})

    monkeypatch.setattr(processes, "_store", Store)
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", lambda *_: pytest.fail("hashed"))
    assert checkpoint.shared_damage(folder / "checkpoints" / "2", "ema") == ""
    assert checkpoint.shared_damage(folder / "checkpoints" / "2", "ema") == "a file is missing"


@pytest.mark.parametrize("text", ["[]", "7", "null", "{}", "\xff"])
def test_a_list_of_checksums_that_is_none_is_damage(trained, tmp_path, text):
    folder = shutil.copytree(trained[0] / "checkpoints", tmp_path / "checkpoints")
    (folder / "2" / "checksums.json").write_text(text, encoding="latin-1")
    with pytest.raises(
        CheckpointError, match=r"checkpoint of step 2 is damaged: .*checksums.json .*; --step"
    ):
        load_weights(folder, layout(trained[1]), trained[1])


def test_a_checkpoint_that_is_deleted_while_it_is_read(trained, tmp_path, monkeypatch):
    _, config, state = trained
    find_damage = checkpoint.find_damage

    def delete(folder, item=""):
        shutil.rmtree(tmp_path / "checkpoints" / "1" / gone[-1], ignore_errors=True)
        if not (tmp_path / "checkpoints" / "2").is_dir():
            save_weights(tmp_path / "checkpoints", 2, state.params)
        return find_damage(folder, item)

    monkeypatch.setattr(checkpoint, "find_damage", delete)
    one = dataclasses.replace(config, optim=dataclasses.replace(config.optim, ema_more=()))
    gone = []
    for step, part in ((None, ""), (None, "ema"), (1, "")):  # all of it, or a part so far
        gone.append(part)
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        save_weights(tmp_path / "checkpoints", 1, state.params)
        if step is None:
            assert load_weights(tmp_path / "checkpoints", layout(one), one)[1] == 2
        else:
            with pytest.raises(CheckpointError, match="step 1 was deleted while it was read"):
                load_weights(tmp_path / "checkpoints", layout(one), one, step=step)


# ----------------------------------------------------------------------------- config.json, edited by hand

BROKEN = {
    "not text": lambda text: b"\xff" + text.encode(),
    "a list": lambda text: b"[]",
    "cut": lambda text: text.encode()[:99],
    "null heads": lambda text: text.replace('"num_heads": 2', '"num_heads": null').encode(),
    "no batch": lambda text: text.replace('"batch_size": 16', '"batch_size": -16').encode(),
    "nothing": None,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_config_that_is_none_is_named_by_all_who_read_it(
    trained, tiny, latents, tmp_path, capsys, monkeypatch, broken
):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    file = folder / "config.json"
    whole = file.read_text()
    file.unlink() if BROKEN[broken] is None else file.write_bytes(BROKEN[broken](whole))
    with pytest.raises(ConfigError, match=r"config\.json") as raised:
        load_run(folder)
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(
        "sys.argv", ["x", "--workdir", str(folder), "--sigma-rel", "0.1", "--out", str(tmp_path / "out")]
    )
    assert snapshots.run_command() == 2
    said = capsys.readouterr().err
    assert said.startswith("snapshots: ") and "config.json" in said and said.count("\n") == 1
    options = {"workdir": str(tmp_path / "new"), "init_from": str(folder)}
    with pytest.raises(ConfigError, match=r"config\.json"):
        train(tiny.config(train=options, data={"dir": str(latents)}))


def test_an_interrupted_reconstruction_is_one_line(trained, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshots, "reconstruct", interrupt)
    out = tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv", ["x", "--workdir", str(trained[0]), "--sigma-rel", "0.1", "--out", str(out)]
    )
    assert snapshots.run_command() == 130
    assert capsys.readouterr().err == "snapshots: interrupted\n"
    assert not out.exists()


def test_a_config_of_another_network_names_both(trained):
    folder, config, _ = trained
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=3))
    message = r"checkpoint of step 2 in .*config\.json.*: --model\.depth is 2 there, 3 here"
    with pytest.raises(CheckpointError, match=message):
        load_weights(folder / "checkpoints", layout(deeper), deeper)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden_size=64))
    with pytest.raises(CheckpointError, match=r"has adaln/bias \(2, 6, 32\), .*config\.json \(2, 6, 64\)"):
        load_weights(folder / "checkpoints", layout(wider), wider)
    fewer = dataclasses.replace(config, optim=dataclasses.replace(config.optim, ema_more=()))
    with pytest.raises(CheckpointError, match=r"holds 4 averages; .*config\.json says 1"):
        load_weights(folder / "checkpoints", layout(config), fewer)


# ------------------------------------------------------------------------------------------- fine-tuning


def test_rows_of_the_same_class_are_found_by_name(tiny):
    model = tiny.config().model  # four classes and the null class
    five = dataclasses.replace(model, num_classes=5)
    no_null = dataclasses.replace(model, class_dropout_prob=0.0)
    named = ("a", "b", "c", "d")
    identity = [(i, i) for i in range(5)]
    assert shared_rows(model, named, model, named) == identity
    assert shared_rows(model, (), model, named) == identity  # nothing is known but the number
    assert shared_rows(model, (), five, ()) == [(4, 5)]
    assert shared_rows(model, ("d", "x", "a", "y"), model, named) == [(0, 3), (2, 0), (4, 4)]
    assert shared_rows(model, named, five, ("z", "a", "b", "c", "d")) == [
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
        (4, 5),
    ]
    assert shared_rows(model, ("a", "a", "b", "c"), model, ("a", "b", "b", "c")) == [(3, 3), (4, 4)]
    assert shared_rows(no_null, named, model, named) == identity[:4]


def test_a_fine_tuned_run_takes_the_rows_of_its_own_classes(trained, tiny, latents, tmp_path, capsys):
    folder, config, state = trained
    source = shutil.copytree(folder, tmp_path / "source")
    described = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps(described | {"label_names": ["c", "x", "y", "a"]}))
    v = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, prediction="v"))
    (source / "config.json").write_text(to_json(v))
    options = {"workdir": str(tmp_path / "tuned"), "steps": 1, "init_from": str(source)}
    params = train(tiny.config(train=options, data={"dir": str(latents)})).params
    given, fresh = (np.asarray(p["y_embed"]["embedding"]) for p in (state.ema[0], state.params))
    expected = [
        given[3],
        fresh[1],
        given[0],
        fresh[3],
        given[4],
    ]  # a b c d null; one step moves them by 0.001
    np.testing.assert_allclose(params["y_embed"]["embedding"], expected, rtol=0, atol=0.005)
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=0.005)
    jax.tree.map(near, params["blocks"], state.ema[0]["blocks"])
    said = capsys.readouterr().err
    assert f"starting from the averaged weights of step 2 in {source}, 3 of 5 rows" in said
    assert "another process than --diffusion.prediction epsilon (there v)" in said
    assert said.count("warning") == 1
