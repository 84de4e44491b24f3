"""Inception's weights from a seed, as the tool that recorded its peers makes them, in both kinds of file."""

import importlib.util
import pathlib

import numpy as np
import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "record_inception.py"


@pytest.fixture(scope="session")
def recorder():
    """tools/record_inception.py as a module: pictures, weights and features from seeds."""
    spec = importlib.util.spec_from_file_location("record_inception", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def recorded(data_dir):
    """What its peers made of them, by name."""
    with np.load(data_dir / "inception.npz") as data:
        return dict(data)


@pytest.fixture(scope="session")
def inception_state(recorder):
    """Random tensors of the published file's names and shapes."""
    from dit_jax.interop import keymap
    from dit_jax.interop.inception import INCEPTION_RULES, inception_shapes

    flat = keymap.flatten(inception_shapes())
    like = keymap.unflatten({path: np.broadcast_to(np.float32(0), s.shape) for path, s in flat.items()})
    shapes = {name: value.shape for name, value in keymap.to_torch(like, INCEPTION_RULES).items()}
    return recorder.random_weights(shapes | {"fc.bias": (1008,)})


@pytest.fixture(scope="session")
def inception_file(inception_state, tmp_path_factory):
    """A .safetensors file of them."""
    import safetensors.numpy

    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    safetensors.numpy.save_file(inception_state, path)
    return path
