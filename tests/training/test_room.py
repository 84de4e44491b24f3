"""Runs that cannot fit are refused before they are compiled; the figures are those of arrays that are made."""

import jax
import pytest

from dit_jax import memory
from dit_jax.config import ConfigError
from dit_jax.training.program import build_program
from dit_jax.training.room import check_room
from dit_jax.training.sharding import make_mesh


def program(config):
    return build_program(config, make_mesh(config.mesh), scaling_factor=1.0, shift_factor=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": {"depth": 10_000, "hidden_size": 2**15}},
            r"--model.hidden-size 32768 and --model.depth 10000 make a training state of \d+\.\d GB on each of 8 dev",
        ),
        (
            {"train": {"batch_size": 2**30}},
            r"--train.batch-size is 1073741824: 134217728 images at once, of \d+\.\d GB or more, on each of 8",
        ),
    ],
)
def test_what_cannot_fit_is_refused(tiny, options, message):
    config = tiny.config(**options)
    with pytest.raises(ConfigError, match=message):
        check_room(config, program(config))


def test_microbatches_fit(tiny):
    config = tiny.config(train={"batch_size": 2**30, "microbatch": 2})
    check_room(config, program(config))


def test_the_figure_is_that_of_the_arrays(tiny, monkeypatch):
    config = tiny.config()
    made = program(config)
    state = made.init()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state, state.ema[0])))
    monkeypatch.setattr(memory, "host_memory", lambda: 8 * held)
    check_room(config, made)
    monkeypatch.setattr(memory, "host_memory", lambda: 8 * held - 8)
    with pytest.raises(ConfigError, match="make a training state of"):
        check_room(config, made)
