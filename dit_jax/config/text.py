"""Captions instead of labels: the options of what the network is told of a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dit_jax.config.processes import Rule

CLIP_LENGTH = 77  # tokens that CLIP's text encoders take
SD3 = "sd3"
SD3_PLACE = "stabilityai/stable-diffusion-3.5-medium"  # where its encoders lie, unless a user says otherwise
SD3_TEXTS = (
    ("text_encoder", "tokenizer"),
    ("text_encoder_2", "tokenizer_2"),
    ("text_encoder_3", "tokenizer_3"),
)
SD3_FOLDERS = tuple(folder for pair in SD3_TEXTS for folder in pair)
BYTES = "bytes"

# Channels of the last hidden states, where a name is enough to know them.
CHANNELS = {SD3: 4096, "Qwen/Qwen3-0.6B": 1024, "Qwen/Qwen3-1.7B": 2048, "google/t5-v1_1-xxl": 4096}


@dataclass(frozen=True)
class TextConfig:
    """Captions: who makes numbers of them, and how often training leaves them out. An empty encoder means labels."""

    encoder: str = ""
    """bytes (a small encoder in the network, trained with it), sd3 (CLIP-L, CLIP-G and T5-XXL joined as Stable
    Diffusion 3 does), or the hub id or folder of a Hugging Face language model, such as Qwen/Qwen3-0.6B, whose last
    hidden states are taken (empty: the network is told labels)."""
    length: int | None = None
    """Tokens of a caption at most (None: 64 bytes; 77 of CLIP and 256 of T5 for sd3; 256 of a language model)."""
    channels: int | None = None
    """Channels of the encoder's output (None: known of bytes, sd3 and a few language models)."""
    clip_widths: tuple[int, int] = (768, 1280)
    """Of sd3: channels of CLIP-L and CLIP-G, whose pooled outputs the network is shown as well."""
    dropout: float = 0.1
    """Share of training captions left out, for guidance."""
    encoder_dropout: float = 0.0
    """Of sd3: share of training captions left out of each of the three encoders by itself (the paper: 0.464, and then
    --text.dropout 0)."""
    layers: int = 2
    """Of bytes: transformer blocks of the encoder."""

    @property
    def embedded(self) -> bool:
        """Whether captions are embedded when data is prepared, by an encoder outside the network."""
        return self.encoder not in ("", BYTES)

    @property
    def pooled(self) -> int:
        """Channels of the pooled text that is stored beside the tokens; 0 for none."""
        return sum(self.clip_widths) if self.encoder == SD3 else 0

    def filled(self) -> TextConfig:
        """With what the encoder's name says."""
        import dataclasses

        if not self.encoder:
            return self
        length = {BYTES: 64, SD3: CLIP_LENGTH + 256}.get(self.encoder, 256)
        channels = CHANNELS.get(self.encoder, 0)
        return dataclasses.replace(
            self,
            length=length if self.length is None else self.length,
            channels=channels if self.channels is None else self.channels,
        )

    def rules(self) -> Iterator[Rule]:
        """What the options must be, once filled."""
        least = {"": 0, SD3: CLIP_LENGTH}.get(self.encoder, 2)
        length, channels = self.length or 0, self.channels or 0
        yield least <= length <= 65536, "length", self.length, f"{least} to 65536 tokens"
        expected = f"the channels of {self.encoder or 'the encoder'}'s hidden states, at most {2**17}"
        yield int(self.embedded) <= channels <= 2**17, "channels", self.channels, expected
        fits = all(width > 0 for width in self.clip_widths)
        most = channels if self.encoder == SD3 else 2**17
        fits &= sum(self.clip_widths) <= most
        yield fits, "clip_widths", self.clip_widths, f"two numbers above 0, at most {most} in sum"
        for name in ("dropout", "encoder_dropout"):
            share = getattr(self, name)
            yield 0 <= share < 1, name, share, "at least 0 and below 1"
        only = self.encoder == SD3 or self.encoder_dropout == 0
        yield only, "encoder_dropout", self.encoder_dropout, f"0, or --text.encoder {SD3}"
        yield 0 <= self.layers <= 64, "layers", self.layers, "0 to 64"
