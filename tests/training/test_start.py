"""What a run checks, and says, before it starts."""

import dataclasses

import pytest

from dit_jax.config import ConfigError
from dit_jax.runs.workdir import check_same_run
from dit_jax.training import loop


def test_a_batch_beyond_memory_is_refused_before_anything_is_made(tiny, latents, tmp_path):
    config = tiny.config(
        data={"dir": str(latents)}, train={"workdir": str(tmp_path / "run"), "batch_size": 2 * 10**9}
    )
    with pytest.raises(ConfigError, match=r"--train.batch-size is 2000000000, of which"):
        loop.train(config)
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_set_is_said(tiny, latents, tmp_path, capsys, monkeypatch):
    class Built(Exception):
        pass

    def build(*args, **kwargs):
        raise Built

    monkeypatch.setattr(loop, "build_program", build)
    for size in (40, 48):
        config = tiny.config(
            data={"dir": str(latents)}, train={"workdir": str(tmp_path / "run"), "batch_size": size}
        )
        with pytest.raises(Built):
            loop.train(config)
        said = capsys.readouterr()
        assert ("the dataset has 40 records: a step takes some of them" in said.out + said.err) == (size > 40)


def test_a_run_goes_on_where_its_autoencoder_has_moved(tiny):
    config = tiny.config(data={"vae": "here"})
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, vae="there"))
    check_same_run(moved, config, "run")
    unmirrored = dataclasses.replace(config, data=dataclasses.replace(config.data, mirror=False))
    with pytest.raises(ConfigError, match=r"--data.mirror is False; the run in run has True"):
        check_same_run(unmirrored, config, "run")
