"""Any Hugging Face language model as an encoder of captions: its last hidden states.

Letters: n tokens of a caption, E channels.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dit_jax.config import ConfigError
from dit_jax.text.encoders import Embedded, in_batches, loaded, quietly
from dit_jax.text.places import PICKLED, WEIGHTS, digest, folder_of, weights_of

_SMALL = ["*.json", "*.txt", "*.model"]  # configs and tokenizers
_WEIGHTS = {
    WEIGHTS: [WEIGHTS, "model-*-of-*.safetensors"],
    PICKLED: [PICKLED, "pytorch_model-*-of-*.bin"],
}


@dataclass(frozen=True)
class LanguageModel:
    """Decoders are causal, encoders see the whole caption; of a model that has both (T5) the encoder is taken."""

    folder: pathlib.Path
    tokenizer: Any
    model: Any
    length: int

    pooled: ClassVar[int] = 0
    clip_widths: ClassVar[tuple[int, int]] = (0, 0)

    @classmethod
    def opened(cls, place: str, length: int) -> LanguageModel:
        """The model in a folder or of a hub id; arguments and errors as of `open_encoder`."""
        import torch
        import transformers

        for patterns in _WEIGHTS.values():
            folder = folder_of(place, _SMALL + patterns)
            if weights_of(folder):
                break
        else:
            raise ConfigError(
                f"the text encoder {place} has no {WEIGHTS}; expected a Hugging Face language model"
            )
        config = loaded(f"{place}'s config.json", transformers.AutoConfig.from_pretrained, folder)
        kind = transformers.AutoModelForTextEncoding if config.is_encoder_decoder else transformers.AutoModel
        model = loaded(f"the text encoder {place}", kind.from_pretrained, folder, dtype=torch.float32)
        tokenizer = loaded(
            f"{place}'s tokenizer", transformers.AutoTokenizer.from_pretrained, folder, padding_side="right"
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ConfigError(
                f"{place}'s tokenizer has no padding; expected one with a token for padding or an end"
            )
        return cls(folder, tokenizer, model.eval(), length)

    @property
    def channels(self) -> int:
        """E."""
        return int(self.model.config.hidden_size)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files of weights."""
        return digest(weights_of(self.folder))

    def encode(self, captions: Sequence[str]) -> list[Embedded]:
        """Embeddings of captions, each of as many tokens as it has."""
        return [found for batch in in_batches(captions) for found in self._encode(batch)]

    def _encode(self, captions: list[str]) -> list[Embedded]:
        with quietly():
            whole = [len(ids) for ids in self.tokenizer(captions)["input_ids"]]
            true = [min(n, self.length) for n in whole]
            if not any(true):  # some tokenizers give nothing of an empty caption
                return [Embedded(np.zeros((0, self.channels), np.float32)) for _ in captions]
            given = self.tokenizer(
                captions, padding=True, max_length=self.length, truncation=True, return_tensors="pt"
            )
            out = self.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
            hidden = out.last_hidden_state.numpy()
        cut = [f"it reads {self.length} of {n} tokens" if n > self.length else "" for n in whole]
        return [Embedded(row[:n].copy(), cut=said) for row, n, said in zip(hidden, true, cut, strict=True)]
