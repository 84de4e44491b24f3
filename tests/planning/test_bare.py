"""The limit that the products of a network's blocks set."""

import jax
import jax.numpy as jnp
import pytest

from dit_jax.config import Config, ModelConfig, resolve
from dit_jax.models import cost
from dit_jax.models.arithmetic import count_macs
from dit_jax.planning import bare

IMAGES = 2


def macs(function, shapes):
    return count_macs(function, *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes))


@pytest.mark.parametrize(("training", "passes"), [(False, 1), (True, 3)])
def test_the_products_are_those_of_the_network(training, passes):
    """Nearly all of its arithmetic, and in the backward pass the logits once more."""
    config = resolve(Config(model=ModelConfig(name="DiT-XL/2", input_size=(64, 64))))
    layers, attention = (
        config.model.depth * sum(macs(*product) for product in of(config, IMAGES, training)) / IMAGES
        for of in (bare.layers, bare.attention)
    )
    of_attention = config.model.depth * 2 * 1024**2 * 1152
    assert attention == of_attention * (7 / 2 if training else 1)
    assert 0.98 < (layers / passes + of_attention) / cost.forward_macs(config) < 1


@pytest.mark.slow
def test_a_chips_limit_is_below_its_peak_and_uses_its_compiler(tiny):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install libtpu (Linux, x86-64)")
    config = tiny.config(model={"hidden_size": 64})
    for training in (False, True):
        limits = [bare.mfu_of_bare_products(config, 32, chip, training) for chip in ("v5e:2x4", "v6e:2x4")]
        assert 0 < limits[1] < limits[0] < 1  # small products fill larger matrix units less
