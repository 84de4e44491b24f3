"""CLIP (Radford et al., arXiv 2103.00020): pictures and captions in one space, by transformers.

Legend: N pictures or captions, C channels of the space.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dit_jax.config import ConfigError
from dit_jax.text.encoders import loaded, quietly, require_transformers
from dit_jax.text.places import WEIGHTS, digest, folder_of, weights_of

PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Clip:
    """A CLIP whose files lie in `folder`."""

    folder: pathlib.Path
    tokenizer: Any
    model: Any
    side: int
    """Of the pictures that it is shown, pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def opened(cls, place: str) -> Clip:
        """The CLIP in a folder or of a hub id, such as openai/clip-vit-large-patch14; ConfigError for others."""
        require_transformers(f"the CLIP {place}")
        import torch
        import transformers

        folder = folder_of(place, ["*.json", "*.txt", WEIGHTS])
        if not weights_of(folder):
            raise ConfigError(f"--clip is {place}, which has no {WEIGHTS}; expected a CLIP of transformers")
        try:
            shown = json.loads((folder / PREPROCESSOR).read_text())
            side = shown["crop_size"]
            side = side["height"] if isinstance(side, dict) else side
            mean, std = tuple(shown["image_mean"]), tuple(shown["image_std"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder / PREPROCESSOR} cannot be read ({error!r}); expected a CLIP's"
            ) from None
        model = loaded(
            f"the CLIP {place}", transformers.CLIPModel.from_pretrained, folder, dtype=torch.float32
        )
        tokenizer = loaded(f"{place}'s tokenizer", transformers.AutoTokenizer.from_pretrained, folder)
        return cls(folder, tokenizer, model.eval(), int(side), mean, std)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files of weights."""
        return digest(weights_of(self.folder))

    def of_pictures(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, C) of length 1."""
        pixels = np.stack([self._pixels(image) for image in images])
        with quietly() as torch:
            found = self.model.vision_model(
                pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
            )
            return _unit(self.model.visual_projection(found.pooler_output).numpy())

    def of_captions(self, captions: Sequence[str]) -> np.ndarray:
        """N captions, cut to the tokens that it reads -> (N, C) of length 1."""
        with quietly():
            tokens = self.tokenizer(
                list(captions), padding=True, truncation=True, return_tensors="pt",
                max_length=self.model.config.text_config.max_position_embeddings,
            )  # fmt: skip
            found = self.model.text_model(**{name: tokens[name] for name in ("input_ids", "attention_mask")})
            return _unit(self.model.text_projection(found.pooler_output).numpy())

    def _pixels(self, image: np.ndarray) -> np.ndarray:
        """The middle square of a picture whose short side is resized to what the model is shown, as CLIP does it."""
        picture = Image.fromarray(image)
        scale = self.side / min(picture.size)
        size = tuple(max(self.side, int(length * scale)) for length in picture.size)
        picture = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, top = ((length - self.side) // 2 for length in picture.size)
        picture = picture.crop((left, top, left + self.side, top + self.side))
        pixels = np.asarray(picture, np.float32) / 255
        return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
