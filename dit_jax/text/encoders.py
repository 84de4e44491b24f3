"""Encoders of captions, by name: the three of Stable Diffusion 3, and Hugging Face language models.

They are run by PyTorch on the host, when data is prepared or a prompt is given, never in a training step; nothing of
PyTorch is imported before one is opened. Letters: n tokens of a caption, E channels, F channels of the pooled text.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dit_jax.config import ConfigError
from dit_jax.config.text import BYTES, CLIP_LENGTH, SD3

AT_ONCE = 8
"""Captions in a batch: what an encoder gives of one hangs on its neighbours by rounding alone."""


@dataclass(frozen=True)
class Embedded:
    """One caption: tokens (n, E) float32 at their true length, pooled (F,) float32 or None.

    cut: what an encoder that was given more tokens than it reads says of it; empty where it read all.
    """

    tokens: np.ndarray
    pooled: np.ndarray | None = None
    cut: str = ""


class TextEncoder(Protocol):
    """What makes embeddings of captions."""

    @property
    def channels(self) -> int:
        """E."""
        ...

    @property
    def pooled(self) -> int:
        """F, 0 where nothing is pooled."""
        ...

    @property
    def length(self) -> int:
        """Tokens of a caption at most."""
        ...

    @property
    def clip_widths(self) -> tuple[int, int]:
        """Of sd3: channels of its two CLIPs, which together are F; (0, 0) of others."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files of weights."""
        ...

    def encode(self, captions: Sequence[str]) -> list[Embedded]:
        """The embeddings of captions, in their order."""
        ...


def open_encoder(name: str, length: int, place: str | None = None, channels: int = 0) -> TextEncoder:
    """The encoder `name`, "sd3" or a Hugging Face hub id or folder, that reads so many tokens.

    place: where its files lie, a folder or a hub id (None: where the name says; of sd3 a folder or hub id of a
    StableDiffusion3Pipeline). channels: what the network expects, 0 where any will do; an sd3 without T5 has zeros of
    that many channels in its place.

    Raises ConfigError where the files are not there or not whole, for a length that the encoder does not have, other
    channels than expected, and where PyTorch or transformers is missing.
    """
    if name in ("", BYTES):
        raise ConfigError(
            f"the text encoder is {name!r}, which is a part of the network; expected one beside it"
        )
    least = CLIP_LENGTH if name == SD3 else 1
    if length < least:
        raise ConfigError(f"the length of captions for {name} is {length}; expected at least {least} tokens")
    require_transformers(f"the text encoder {name}")
    from dit_jax.text.language_model import LanguageModel
    from dit_jax.text.sd3 import open_sd3

    encoder: TextEncoder = (
        open_sd3(place, length, channels) if name == SD3 else LanguageModel.opened(place or name, length)
    )
    if channels and encoder.channels != channels:
        raise ConfigError(
            f"the text encoder {place or name} gives {encoder.channels} channels; expected {channels}, as "
            "--text.channels says"
        )
    return encoder


def require_transformers(what: str) -> None:
    """Raises ConfigError where a package that `what` needs is missing."""
    for module in ("torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{what} needs {module}, which is missing: pip install 'dit_jax[text]'")


def in_batches(captions: Sequence[str]) -> Iterator[list[str]]:
    """The captions, a few at a time."""
    for start in range(0, len(captions), AT_ONCE):
        yield list(captions[start : start + AT_ONCE])


@contextlib.contextmanager
def quietly() -> Iterator[Any]:
    """transformers without its bars and its advice, and PyTorch without gradients."""
    import torch
    import transformers

    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with torch.no_grad():
            yield torch
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def loaded(what: str, load: Any, *args: Any, **how: Any) -> Any:
    """What `load(*args, **how)` of transformers gives; its errors, which are of nearly any kind, in one sentence."""
    try:
        with quietly():
            return load(*args, **how)
    except Exception as error:
        reason = " ".join(str(error).split())[:200].split(". ")[0]
        raise ConfigError(
            f"{what} cannot be read ({type(error).__name__}: {reason}); expected it whole"
        ) from None
