"""The three text encoders of Stable Diffusion 3: CLIP-L, CLIP-G and T5-XXL (arXiv 2403.03206, section 4 and fig. 2).

Both CLIPs' hidden states before the last layer stand side by side, filled up with zeros, in the first 77 tokens; T5's
last hidden states follow. Their pooled outputs together are the pooled text. Nothing is masked: padding is a part of
what the network sees.

Letters: n tokens, E channels of T5, F of the two pooled outputs.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_jax.config import ConfigError
from dit_jax.config.text import CHANNELS, CLIP_LENGTH, SD3, SD3_PLACE, SD3_TEXTS
from dit_jax.text.encoders import Embedded, in_batches, loaded, quietly
from dit_jax.text.places import digest, folder_of, weights_of

*CLIPS, T5 = SD3_TEXTS
_FILES = [
    *(f"{folder}/*" for _, folder in (*CLIPS, T5)),
    *(f"{folder}/{name}" for folder, _ in (*CLIPS, T5)
      for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")),
]  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One of the three: its tokenizer, its model, and how many tokens it reads."""

    name: str
    tokenizer: Any
    model: Any
    length: int

    def ids(self, captions: list[str]) -> tuple[Any, list[str]]:
        """(ids (B, length) as a tensor, what is said of each caption that was cut)."""
        whole = [len(ids) for ids in self.tokenizer(captions)["input_ids"]]
        given = self.tokenizer(
            captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        cut = [f"{self.name} reads {self.length} of {n} tokens" if n > self.length else "" for n in whole]
        return given["input_ids"], cut


@dataclass(frozen=True)
class Sd3Encoder:
    """CLIP-L, CLIP-G and T5; `t5` None where there is none, and zeros stand in its place."""

    folder: pathlib.Path
    clips: tuple[Part, Part]
    t5: Part | None
    length: int
    channels: int

    @property
    def clip_widths(self) -> tuple[int, int]:
        """Channels of the two CLIPs."""
        first, second = (int(clip.model.config.hidden_size) for clip in self.clips)
        return first, second

    @property
    def pooled(self) -> int:
        """F."""
        return sum(int(clip.model.config.projection_dim) for clip in self.clips)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files of weights of those of the three that there are."""
        parts = [folder for folder, _ in CLIPS] + ([T5[0]] if self.t5 else [])
        return digest(file for part in parts for file in weights_of(self.folder / part))

    def encode(self, captions: Sequence[str]) -> list[Embedded]:
        """Embeddings of captions, each of `length` tokens."""
        return [found for batch in in_batches(captions) for found in self._encode(batch)]

    def _encode(self, captions: list[str]) -> list[Embedded]:
        tokens = np.zeros((len(captions), self.length, self.channels), np.float32)
        pooled, cuts, at = [], [], 0
        with quietly():
            for clip in self.clips:
                ids, cut = clip.ids(captions)
                out = clip.model(ids, output_hidden_states=True)
                hidden = out.hidden_states[-2].numpy()  # without CLIP's final norm
                tokens[:, :CLIP_LENGTH, at : at + hidden.shape[-1]] = hidden
                at += hidden.shape[-1]
                pooled.append(out.text_embeds.numpy())
                cuts.append(cut)
            if self.t5 is not None and self.length > CLIP_LENGTH:
                ids, cut = self.t5.ids(captions)
                tokens[:, CLIP_LENGTH:] = self.t5.model(ids).last_hidden_state.numpy()
                cuts.append(cut)
        said = [", ".join(dict.fromkeys(filter(None, of_one))) for of_one in zip(*cuts, strict=True)]
        both = np.concatenate(pooled, axis=-1)  # (B, F)
        return [Embedded(*one) for one in zip(tokens, both, said, strict=True)]


def open_sd3(place: str | None, length: int, channels: int = 0) -> Sd3Encoder:
    """The encoders of a StableDiffusion3Pipeline's folder or hub id; arguments and errors as of `open_encoder`."""
    import transformers

    place = place or SD3_PLACE
    folder = folder_of(place, _FILES)
    clips = [
        _part(folder, place, "CLIP", parts, CLIP_LENGTH, transformers.CLIPTextModelWithProjection)
        for parts in CLIPS
    ]
    t5 = None
    if (folder / T5[0]).is_dir():
        t5 = _part(folder, place, "T5", T5, length - CLIP_LENGTH, transformers.T5EncoderModel)
        channels = int(t5.model.config.d_model)
    encoder = Sd3Encoder(folder, (clips[0], clips[1]), t5, length, channels or CHANNELS[SD3])
    if sum(encoder.clip_widths) > encoder.channels or sum(encoder.clip_widths) != encoder.pooled:
        raise ConfigError(
            f"the text encoders in {place} have widths {encoder.clip_widths}, {encoder.pooled} pooled channels and "
            f"{encoder.channels} of T5; expected as many pooled as wide, and at most T5's"
        )
    return encoder


def _part(
    folder: pathlib.Path, place: str, name: str, parts: tuple[str, str], length: int, kind: Any
) -> Part:
    import torch
    import transformers

    model, tokenizer = (folder / part for part in parts)
    if not weights_of(model) or not tokenizer.is_dir():
        raise ConfigError(
            f"{place} has no {parts[1] if weights_of(model) else parts[0]}; expected a StableDiffusion3Pipeline with "
            "its text encoders and tokenizers, or --text-encoder, where they lie"
        )
    read = loaded(str(tokenizer), transformers.AutoTokenizer.from_pretrained, tokenizer)
    weights = loaded(str(model), kind.from_pretrained, model, dtype=torch.float32)
    return Part(name, read, weights.eval(), length)
