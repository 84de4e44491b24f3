"""The loader's benchmark: waiting is seen where there is some, and the script has its fields."""

import contextlib
import json
import pathlib
import time

import jax
import pytest
from started import finish, start

from dit_jax.config import Config, ModelConfig, TrainConfig, resolve

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def loader():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import loader

        yield loader


@pytest.mark.slow
def test_waiting_for_slow_batches_is_seen(loader, tmp_path, monkeypatch):
    dataset = loader.write_ours(tmp_path, 256)
    model = ModelConfig(name="DiT-S/8", depth=1, hidden_size=32, num_heads=2)
    config = resolve(Config(model=model, train=TrainConfig(batch_size=16)))
    quick = loader.batches

    def slow(*args):
        with contextlib.closing(quick(*args)) as stream:
            for batch in stream:
                jax.block_until_ready(
                    jax.live_arrays()
                )  # the devices have no work left, however busy they are
                time.sleep(0.2)
                yield batch

    monkeypatch.setattr(loader, "batches", slow)
    found = loader.wait_share(config, dataset, 5)
    assert found["wait_ms"] >= 200
    assert found["device_wait_share"] == found["loop_wait_share"] <= 1


@pytest.mark.slow
def test_rates_and_shares_are_written(tmp_path):
    sizes = {"records": 600, "files": 200, "batch-size": 32, "rounds": 1, "seconds": 0.2, "steps": 1}
    options = [part for name, value in sizes.items() for part in (f"--{name}", value)]
    finish(start(FOLDER / "loader.py", *options, "--out", tmp_path / "r.json"))
    found = json.loads((tmp_path / "r.json").read_text())
    # Mean and std of image and mirror, two bytes each.
    assert found["record_bytes"] == 4 * 32 * 32 * 2 * 2 * 2
    rates = found["records_per_second"]
    for name in ("streamed", "ram"):
        assert found["ratio_to_peer"][name] == pytest.approx(rates[name] / rates["peer"])
    for run in ("digits", "synthetic"):
        assert 0 <= found[run]["device_wait_share"] <= found[run]["loop_wait_share"] < 1
