"""Strict test environment: 8 virtual CPU devices, no silent rank promotion, warnings are errors."""

import os
import subprocess

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", ".cache/jax")  # a second run of the tests compiles little
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_default_matmul_precision", "highest")
jax.devices()  # now: a test may change the environment that they are made from, for the processes that it starts


@pytest.fixture
def default_precision():
    """Products as users get them: at jax's default precision, where the other tests ask for the highest."""
    with jax.default_matmul_precision(None):
        yield


@pytest.fixture(scope="session")
def data_dir():
    """tests/data: the small golden files."""
    import pathlib

    return pathlib.Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def sit(data_dir):
    """Numbers recorded from SiT, by name; arrays in its layout."""
    import numpy as np

    with np.load(data_dir / "sit.npz") as data:
        return dict(data)


@pytest.fixture(scope="session")
def sit_network(sit):
    """The recorded network, jitted: (x, t) -> output, for the recorded labels."""
    from dit_jax import DiT
    from dit_jax.interop.official import params_from_state_dict

    settings = {k.removeprefix("config/"): v.item() for k, v in sit.items() if k.startswith("config/")}
    state = {k.removeprefix("params/"): v for k, v in sit.items() if k.startswith("params/")}
    model = DiT(**settings)
    params = params_from_state_dict(state, model)
    return jax.jit(lambda x, t: model.apply({"params": params}, x, t, jax.numpy.asarray(sit["y"])))


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives the folder of a new file system with room for that many megabytes."""
    mounted = []

    def make(megabytes):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip(
                "needs a file system that can be full: run as root, or under `unshare -rm`, to mount a tmpfs"
            )
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
