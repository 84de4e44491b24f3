"""The published weights of the Inception network of FID, out of a PyTorch file.

pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` and torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`
hold the same tensors under the same names; a safetensors file of them is read too.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from typing import Any

import jax
import numpy as np

from dit_jax import paths
from dit_jax.buckets import BucketError
from dit_jax.config import ConfigError
from dit_jax.interop import keymap
from dit_jax.interop.keymap import CONV, LINEAR, Rule
from dit_jax.models.inception import SIZE, Inception

RELEASE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
VARIABLE = "DIT_JAX_INCEPTION"  # of the environment: the file's path

# Layers of the stem, and layers of a block.
_PLACES = ((r"(\w+)", r"\1"), (r"(\w+)/(\w+)", r"\1.\2"))

INCEPTION_RULES: tuple[Rule, ...] = (
    Rule("params/fc/kernel", "fc.weight", LINEAR),
    *(
        rule
        for path, name in _PLACES
        for rule in (
            Rule(f"params/{path}/conv/kernel", f"{name}.conv.weight", CONV),
            Rule(f"params/{path}/bn/scale", f"{name}.bn.weight"),
            Rule(f"params/{path}/bn/bias", f"{name}.bn.bias"),
            Rule(f"batch_stats/{path}/bn/mean", f"{name}.bn.running_mean"),
            Rule(f"batch_stats/{path}/bn/var", f"{name}.bn.running_var"),
        )
    ),
)


def find_inception(path: str | None) -> pathlib.Path:
    """The file that the option --inception names, or else $DIT_JAX_INCEPTION.

    Raises ConfigError, which says where to get it, where there is none.
    """
    named = path or os.environ.get(VARIABLE)
    if not named:
        raise ConfigError(
            f"--inception is not given and ${VARIABLE} is not set; expected the file of weights {RELEASE}"
        )
    file = paths.from_user(named)
    if not paths.is_file(file):
        option = "--inception" if path else f"${VARIABLE}"
        raise ConfigError(f"{option} is {named}, where there is no file; expected that of {RELEASE}")
    return file


def load_inception(file: pathlib.Path) -> tuple[dict[str, Any], str]:
    """(variables of `Inception`, SHA-256 of the file). Raises ConfigError for a file that does not fit.

    A pickle is read by torch without running what it may hold beside tensors.
    """
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    # The Inception Score uses no bias; how many batches training saw is of no use.
    kept = {
        name: tensor
        for name, tensor in _read(file).items()
        if name != "fc.bias" and not name.endswith("num_batches_tracked")
    }
    try:
        return keymap.to_flax(kept, inception_shapes(), INCEPTION_RULES, str(file)), found
    except keymap.MismatchError as error:
        wrong = [
            f"{len(tensors)} tensors {how}"
            for how, tensors in (
                ("missing", error.missing), ("unexpected", error.unexpected), ("of another shape", error.misshapen)
            )
            if tensors
        ]  # fmt: skip
        raise ConfigError(
            f"{file} holds other weights ({', '.join(wrong)}); expected the file of {RELEASE}"
        ) from None


def inception_shapes() -> dict[str, Any]:
    """The variables of `Inception` as shapes."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32)
    return jax.eval_shape(Inception().init, jax.random.key(0), images)


def _read(file: pathlib.Path) -> dict[str, np.ndarray]:
    expected = f"expected a file of weights such as {RELEASE}"
    if file.suffix == ".safetensors":
        import safetensors.numpy

        try:
            with paths.local_file(file) as here:
                return safetensors.numpy.load_file(here)
        except BucketError:
            raise
        except Exception as error:  # readers of damaged files raise nearly anything
            raise ConfigError(f"{file} cannot be read ({error}); {expected}") from None
    try:
        import torch
    except ImportError:
        raise ConfigError(
            f"{file} is a file of PyTorch, which is not installed; expected torch, or the weights as .safetensors"
        ) from None
    try:
        with paths.local_file(file) as here:
            found = torch.load(here, map_location="cpu", weights_only=True)
        return {name: tensor.detach().numpy() for name, tensor in found.items()}
    except BucketError:
        raise
    except Exception as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ConfigError(f"{file} cannot be read ({reason}); {expected}") from None
