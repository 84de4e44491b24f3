"""Files of samples: what sample.py --npz writes and evaluators read.

Legend: N samples, H and W sides in pixels.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_jax import paths
from dit_jax.buckets import BucketError
from dit_jax.config import ConfigError
from dit_jax.files import whole_file


@dataclass(frozen=True)
class Provenance:
    """Where samples come from, as far as it is known."""

    run: str | None = None
    """The run's folder."""
    step: int | None = None
    """Of the checkpoint."""
    average: str | None = None
    """Which weights: `ema`, `params`."""
    sampler: str | None = None
    steps: int | None = None
    """Sampling steps."""
    guidance: dict[str, Any] | None = None
    """Scale, channels, interval and so on, by name."""
    seed: int | None = None
    precision: str | None = None
    """In which the network computed."""
    prompts: list[str] | None = None
    """The captions asked for, each once."""
    negative_prompt: str | None = None


def save_samples(
    path: paths.Named,
    images: np.ndarray,
    labels: np.ndarray | None,
    provenance: Provenance | None = None,
    prompts: Sequence[str] | None = None,
) -> None:
    """arr_0: images (N, H, W, 3) uint8, as the ADM evaluator reads them; arr_1: labels (N,), or `prompts`: captions
    (N,); `provenance`: JSON text.

    The file appears when it is whole.
    """
    write_samples(path, [images], labels, provenance, prompts)


def write_samples(
    path: paths.Named,
    blocks: Iterable[np.ndarray],
    labels: np.ndarray | None,
    provenance: Provenance | None = None,
    prompts: Sequence[str] | None = None,
) -> None:
    """The same of images that come in blocks (n, H, W, 3), N in all, of which one is held at a time."""
    blocks = iter(blocks)
    first = next(blocks)
    beside = {} if labels is None else {"arr_1": labels}
    beside |= {} if prompts is None else {"prompts": np.asarray(prompts, np.str_)}
    count = len(next(iter(beside.values())))
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False,
        "shape": (count, *first.shape[1:]),
    }  # fmt: skip
    text = json.dumps(dataclasses.asdict(provenance or Provenance()))
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for block in itertools.chain([first], blocks):
                member.write(np.ascontiguousarray(block).data)
        for name, values in (beside | {"provenance": np.array(text)}).items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


def load_provenance(path: paths.Named) -> Provenance:
    """What such a file says of its samples; nothing for a file of another program. Raises ConfigError."""
    known = {field.name for field in dataclasses.fields(Provenance)}
    try:
        with paths.to_path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if "provenance" not in file.files:
                return Provenance()
            found = json.loads(str(file["provenance"]))
        return Provenance(**{name: value for name, value in found.items() if name in known})
    except BucketError:
        raise
    except Exception as error:  # readers of damaged files raise nearly anything
        raise ConfigError(
            f"--npz names {path}, whose provenance cannot be read ({error}); expected a file of sample.py"
        ) from None


def load_prompts(path: paths.Named) -> list[str]:
    """The captions that such a file's samples show, in their order. Raises ConfigError where it has none."""
    try:
        with paths.to_path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return [str(caption) for caption in file["prompts"]]
    except BucketError:
        raise
    except Exception as error:  # readers of damaged files raise nearly anything
        raise ConfigError(
            f"--npz names {path}, whose captions cannot be read ({error}); expected a file of sample.py --prompts"
        ) from None


def load_samples(path: paths.Named) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of such a file. Raises ConfigError for a file that is not one."""
    images, labels = load_pictures(path, labelled=True)
    assert labels is not None
    return images, labels


def load_pictures(path: paths.Named, labelled: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """The same, also of a file of another program without labels unless they are asked for."""
    try:
        if not paths.is_file(path):  # a pipe would be waited for
            raise ValueError("it is no file")
        with paths.to_path(path).open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            images = found["arr_0"]
            labels = found["arr_1"] if labelled or "arr_1" in found.files else None
    except BucketError:
        raise
    except Exception as error:  # readers of damaged files raise nearly anything
        raise ConfigError(
            f"--npz names {path}, which cannot be read ({error}); expected a file of sample.py"
        ) from None
    pictures = images.ndim == 4 and images.dtype == np.uint8 and images.shape[-1] in (1, 3)
    right = labels is None or (labels.shape == images.shape[:1] and labels.dtype.kind in "iu")
    if not pictures or not right:
        of_labels = "" if labels is None else f" and arr_1 {labels.shape} {labels.dtype}"
        raise ConfigError(
            f"--npz names {path} with arr_0 {images.shape} {images.dtype}{of_labels}; "
            f"expected images (N, H, W, 3) uint8 and labels (N,) of integers"
        )
    return images, labels
