"""What samples are told: the labels or captions that a command names, checked, and embedded where an encoder must.

Letters: P captions, N samples, M tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dit_jax.conditions import Condition, TextCondition
from dit_jax.config import ConfigError
from dit_jax.config.saved import shown
from dit_jax.config.text import BYTES, SD3, SD3_PLACE
from dit_jax.generation.options import DrawArgs
from dit_jax.generation.sampling import SamplingOptions, check_sampling, samples_of
from dit_jax.models.create import Model
from dit_jax.runs.checkpoint import say
from dit_jax.runs.convert import WEIGHTS
from dit_jax.samplers.noise import choices, sample_keys
from dit_jax.text.encoders import Embedded, open_encoder
from dit_jax.text.prompt_sets import read_prompts

if TYPE_CHECKING:
    from dit_jax.generation.command import Run

OPTIONS = ("prompt", "prompts", "negative_prompt", "text_encoder")


@dataclass(frozen=True)
class Asked:
    """What a command names for its samples to show.

    Attributes:
      named: the conditions, P of them; of captions that an encoder must embed their null, until `embedded`.
      captions: the captions, in the order of `named`; empty with labels.
      negative: the caption whose condition takes the null's place under guidance, None for the network's own null.
      null: that condition, of one sample.
      place: where the encoder lies, None where there is none to ask.
      weights: the fingerprint that it must have, empty where any will do.
      fingerprint: of the encoder's weights, empty where it was not asked.
    """

    named: Condition
    captions: tuple[str, ...] = ()
    negative: str | None = None
    null: Condition | None = None
    place: str | None = None
    weights: str = ""
    fingerprint: str = ""

    def embedded(self, kind: Any) -> Asked:
        """With the conditions that the encoder makes of the captions; ConfigError where it cannot be read."""
        if self.place is None:
            return self
        assert isinstance(kind, TextCondition)
        encoder = open_encoder(kind.encoder, kind.length, self.place, kind.channels)
        if encoder.pooled != kind.pooled or encoder.clip_widths != kind.clip_widths:
            raise ConfigError(
                f"the text encoder {self.place} has CLIPs of widths {encoder.clip_widths}; the network was trained "
                f"with {kind.clip_widths}"
            )
        if self.weights not in ("", encoder.fingerprint):
            raise ConfigError(
                f"the text encoder {self.place} has weights {encoder.fingerprint[:12]}; the dataset's captions were "
                f"embedded with {self.weights[:12]}"
            )
        captions = list(self.captions)
        found = encoder.encode([*captions, *([] if self.negative is None else [self.negative])])
        for caption, one in zip([*captions, self.negative], found, strict=False):
            if one.cut:
                say(f"warning: of the prompt {shown(caption)} {one.cut}")
        table, null = padded(found[: len(captions)], kind), self.null
        if self.negative is not None:
            null = {name: values[0] for name, values in padded(found[len(captions) :], kind).items()}
        return dataclasses.replace(self, named=table, null=null, fingerprint=encoder.fingerprint)

    def rows(self, args: DrawArgs, count: int) -> np.ndarray:
        """Which of `named` samples 0 to count - 1 show, (N,), in the order that was asked for."""
        among, numbers = samples_of(self.named), np.arange(count)
        if args.label_order == "random":
            return np.asarray(choices(sample_keys(jax.random.key(args.seed), numbers), among))
        return numbers % among

    def conditions(self, rows: np.ndarray) -> Condition:
        """The conditions in these rows of `named`."""
        return {
            name: values[rows] if values.ndim == 1 else Taken(values, rows)
            for name, values in self.named.items()
        }

    def captions_of(self, rows: np.ndarray) -> list[str] | None:
        """The captions in these rows, None with labels."""
        return [self.captions[row] for row in rows] if self.captions else None


@dataclass(frozen=True)
class Taken:
    """Rows (N,) of a table of arrays (P, ...), as an array (N, ...) that is not made before it is asked for: a
    caption's embedding is of megabytes, and has thousands of samples."""

    table: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: Any) -> np.ndarray:
        return self.table[self.rows[which]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.table.dtype, copy=False)


def asked_of(args: DrawArgs, run: Run, model: Model) -> Asked:
    """What the options name; ConfigError for those that the run does not take, and for text that is none."""
    kind = model.condition
    if not isinstance(kind, TextCondition):
        given = next((name for name in OPTIONS if getattr(args, name) not in (None, [])), None)
        if given is not None:
            raise ConfigError(
                f"--{given.replace('_', '-')} is given, but {run.place} is told labels; expected --labels"
            )
        return Asked(kind.parse(args.labels, run.metadata.label_names))
    if args.labels:
        raise ConfigError(
            f"--labels is {shown(args.labels)}, but {run.place} is told captions; expected --prompt"
        )
    captions, negative = captions_of(args), args.negative_prompt
    if negative is not None:
        _check_text("--negative-prompt", negative)
        if args.guide_workdir is not None:
            raise ConfigError(
                "--negative-prompt and --guide-workdir are both given; expected one that guides"
            )
    if not captions:
        say("no --prompt is given: the pictures are of an empty caption")
        captions = [""]
    if kind.encoder == BYTES:
        return _in_bytes(args, kind, captions)
    if kind.encoder == SD3 and run.metadata.source.startswith(WEIGHTS) and negative is None:
        negative = ""  # as StableDiffusion3Pipeline does
    weights = run.metadata.text.weights if run.metadata.text else ""
    return Asked(kind.in_turn(1), tuple(captions), negative, None, place_of(args, run), weights)


def check_asked(model: Model, run: Run, options: SamplingOptions, asked: Asked, guide: Run | None) -> None:
    """Raises ConfigError where options or what is asked do not fit the network or each other."""
    if asked.negative and options.cfg_scale == 1:
        raise ConfigError(
            "--negative-prompt is given with --cfg-scale 1, which guides by nothing; expected another"
        )
    by_another = guide is not None or asked.negative is not None
    check_sampling(model, run.config, options, asked.named, by_another)


def _in_bytes(args: DrawArgs, kind: TextCondition, captions: list[str]) -> Asked:
    if args.text_encoder is not None:
        raise ConfigError(
            f"--text-encoder is {args.text_encoder}, but the network has an encoder of its own (bytes); expected none"
        )
    negative = args.negative_prompt
    for caption in [*captions, *([] if negative is None else [negative])]:
        size = len(caption.encode())
        if size >= kind.length:
            say(
                f"warning: of the prompt {shown(caption)} the network reads {kind.length - 1} of {size} bytes"
            )
    null = (
        None if negative is None else {name: values[0] for name, values in kind.parse([negative], ()).items()}
    )
    return Asked(kind.parse(captions, ()), tuple(captions), negative, null)


def captions_of(args: DrawArgs) -> list[str]:
    """The captions of --prompt, or of --prompts; ConfigError where these are none."""
    for caption in args.prompt:
        _check_text("--prompt", caption)
    if args.prompts is None:
        return list(args.prompt)
    if args.prompt:
        raise ConfigError("--prompt and --prompts are both given; expected one of them")
    return list(read_prompts("--prompts", args.prompts).captions)


def _check_text(option: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no UTF-8
        raise ConfigError(f"{option} is {shown(text)}; expected text that is UTF-8") from None


def place_of(args: DrawArgs, run: Run) -> str:
    """Where the encoder of a run's captions lies."""
    text, name = run.metadata.text, run.config.text.encoder
    return args.text_encoder or (text and text.place) or (SD3_PLACE if name == SD3 else name)


def padded(found: Sequence[Embedded], kind: TextCondition) -> Condition:
    """Embeddings of captions, P of them, as arrays of M tokens each and a mask of those that there are."""
    arrays = {name: np.zeros((len(found), *field.shape), field.dtype) for name, field in kind.fields.items()}
    for i, one in enumerate(found):
        arrays["context"][i, : len(one.tokens)] = one.tokens
        arrays["mask"][i, : len(one.tokens)] = True
        if one.pooled is not None:
            arrays["pooled"][i] = one.pooled
    return arrays
