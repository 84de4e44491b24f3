"""What a network is told of a sample besides its time: each kind of condition, said once.

A condition is a dict of arrays whose first axis is the batch, one for each of the kind's `fields`. Its kind knows
their shapes, the null that guidance and dropping put in its place, how it lies in a record and a batch, how a user
names it, and which rows of a table of weights stand for the same in two runs. A network says which kind it takes,
`model.condition`; whoever hands a condition on knows nothing but its tree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import Config, ConfigError
from dit_jax.config.text import BYTES, CLIP_LENGTH, SD3

Condition = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """One array of a condition: shape and type of a sample's part; a record stores it as 64-bit integers."""

    shape: tuple[int, ...] = ()
    dtype: Any = np.int32


class _Arrays:
    """A condition's arrays, of which `fields` tells name, shape and type."""

    fields: ClassVar[Any]

    def tree(self, condition: Any) -> Condition:
        """The condition as its dict."""
        return dict(condition)

    def on_host(self, condition: Any) -> dict[str, np.ndarray]:
        """The condition as NumPy arrays."""
        given = self.tree(condition)
        return {name: np.asarray(given[name], field.dtype) for name, field in self.fields.items()}

    def shapes(self, n: int, sharding: Any = None) -> Condition:
        """Shapes and types of n samples' conditions."""
        return {
            name: jax.ShapeDtypeStruct((n, *field.shape), field.dtype, sharding=sharding)
            for name, field in self.fields.items()
        }

    def empty(self, n: int) -> dict[str, np.ndarray]:
        """Arrays on the host for n samples, to be filled."""
        return {name: np.empty((n, *field.shape), field.dtype) for name, field in self.fields.items()}

    def of(self, batch: Mapping[str, Any]) -> Condition:
        """The condition in a batch of data."""
        return {name: batch[name] for name in self.fields}


@dataclass(frozen=True)
class LabelCondition(_Arrays):
    """The class of a sample, {"label": (B,) int32}; the number after the last class stands for none."""

    num_classes: int
    """0 for an unconditional network, which is given labels and ignores them."""
    class_dropout_prob: float = 0.0
    """Share of training labels replaced by the null."""

    fields: ClassVar[dict[str, Field]] = {"label": Field()}
    table: ClassVar[str] = "y_embed/embedding"
    """The network's parameter with a row for each class, and one for the null where labels are dropped."""

    def tree(self, condition: Any) -> Condition:
        """The condition as its dict; a plain array of labels is one."""
        return dict(condition) if isinstance(condition, Mapping) else {"label": condition}

    # ----------------------------------------------------------------------------- the null and dropping

    @property
    def has_null(self) -> bool:
        """Whether the network was trained to do without."""
        return self.num_classes > 0 and self.class_dropout_prob > 0

    @property
    def null(self) -> Condition:
        """What stands in the place of a sample's condition; each value broadcasts to a sample's part."""
        return {"label": self.num_classes}

    def drop(self, key: jax.Array, condition: Condition) -> Condition:
        """The condition, each sample's replaced by the null with the training's probability."""
        labels = drop_labels(key, condition["label"], self.num_classes, self.class_dropout_prob)
        return {"label": labels}

    # ----------------------------------------------------------------------- names, and what is refused

    def parse(self, texts: Sequence[str], names: Sequence[str]) -> Condition:
        """The conditions that a user names on the command line, in this order; all classes if none is named."""
        return {"label": label_numbers(texts, names, self.num_classes)}

    def in_turn(self, n: int) -> Condition:
        """Conditions of n samples that show them all."""
        return {"label": np.arange(n, dtype=np.int32) % max(self.num_classes, 1)}

    def fits(self, condition: Condition) -> np.ndarray:
        """Which samples' conditions are of this kind, (n,) bool."""
        labels = np.asarray(condition["label"])
        return (labels >= 0) & (labels < max(self.num_classes, 1))

    def check(self, condition: Condition) -> None:
        """Raises ConfigError for a class that there is not."""
        wrong = ~self.fits(condition)
        if wrong.any():
            bad, highest = condition["label"][wrong][0], max(self.num_classes - 1, 0)
            raise ConfigError(f"--labels names class {bad}; expected 0 to {highest}")

    def check_data(self, stored: AnyCondition, where: str) -> None:
        """Raises ConfigError where the records of a dataset, named by `where`, do not hold this condition."""
        if self.num_classes not in (0, stored.num_classes):
            raise ConfigError(
                f"{where} has {stored.num_classes} classes; --model.num-classes says {self.num_classes}"
                + (" (0 trains without labels)" if stored.num_classes == 0 else "")
            )


@dataclass(frozen=True)
class TextCondition(_Arrays):
    """The caption of a sample, up to M tokens of it.

    Of the encoder `bytes`, which is a part of the network: {"tokens": (B, M) int32}, 1 first, then each byte of the
    caption's UTF-8 plus 2, then 0. Of others {"context": (B, M, E) float, "mask": (B, M) bool, which tokens there
    are}, and where their output is pooled {"pooled": (B, F) float}. An empty caption is the null, and so are zeros.
    """

    encoder: str
    length: int
    channels: int = 0
    pooled: int = 0
    dropout: float = 0.0
    """Share of training captions replaced by the null."""
    clip_widths: tuple[int, int] = (0, 0)
    """Of sd3: channels of the two encoders that share the first CLIP_LENGTH tokens and the pooled output."""
    encoder_dropout: float = 0.0
    """Of sd3: share of training captions replaced by the null of each encoder on its own."""

    table: ClassVar[str] = ""
    num_classes: ClassVar[int] = 0
    class_dropout_prob: ClassVar[float] = 0.0

    @property
    def fields(self) -> dict[str, Field]:
        """Name, shape and type of each array."""
        if self.encoder == BYTES:
            return {"tokens": Field((self.length,), np.int32)}
        found = {
            "context": Field((self.length, self.channels), np.float32),
            "mask": Field((self.length,), np.bool_),
        }
        return found | ({"pooled": Field((self.pooled,), np.float32)} if self.pooled else {})

    @property
    def has_null(self) -> bool:
        """Whether the network was trained to do without."""
        return self.dropout > 0 or self.encoder_dropout > 0

    @property
    def null(self) -> Condition:
        """What stands in the place of a sample's condition; each value broadcasts to a sample's part."""
        if self.encoder == BYTES:
            return {"tokens": np.asarray([START] + [0] * (self.length - 1), np.int32)}
        return {name: np.zeros((), field.dtype) for name, field in self.fields.items()}

    def drop(self, key: jax.Array, condition: Condition) -> Condition:
        """The condition, each sample's replaced by the null with the training's probability."""
        whole, *parts = jax.random.split(key, 4)
        n = len(jax.tree.leaves(condition)[0])
        if self.encoder_dropout > 0:
            gone = [jax.random.bernoulli(part, self.encoder_dropout, (n,)) for part in parts]
            condition = self._without(gone, condition)
        if self.dropout == 0:
            return condition
        chosen, null = jax.random.bernoulli(whole, self.dropout, (n,)), self.null
        return {
            name: jnp.where(_spread(chosen, value), jnp.asarray(null[name], value.dtype), value)
            for name, value in condition.items()
        }

    def _without(self, gone: Sequence[jax.Array], condition: Condition) -> Condition:
        """Zeros where CLIP-L, CLIP-G or T5 is gone, (B,) bool each (arXiv 2403.03206, appendix B.3)."""
        first, _ = self.clip_widths
        at, channel = np.arange(self.length)[:, None], np.arange(self.channels)[None]
        of_clip = at < CLIP_LENGTH
        where = (of_clip & (channel < first), of_clip & (channel >= first), ~of_clip)
        context, pooled = condition["context"], condition["pooled"]
        in_pooled = np.arange(self.pooled)
        of_pooled = (in_pooled < first, in_pooled >= first, in_pooled < 0)
        for is_gone, part, pooled_part in zip(gone, where, of_pooled, strict=True):
            context = jnp.where(is_gone[:, None, None] & part[None], 0, context)
            pooled = jnp.where(is_gone[:, None] & pooled_part[None], 0, pooled)
        return condition | {"context": context, "pooled": pooled}

    def parse(self, texts: Sequence[str], names: Sequence[str]) -> Condition:
        """The conditions of captions; the null if there is none. ConfigError where an encoder must make them."""
        if self.encoder != BYTES:
            raise ConfigError(f"captions for {self.encoder} are embedded by it; expected embeddings")
        return {"tokens": byte_tokens(list(texts) or [""], self.length)}

    def in_turn(self, n: int) -> Condition:
        """Conditions of n samples: the null, as no captions are known."""
        null = self.null
        return {
            name: np.broadcast_to(np.asarray(null[name], field.dtype), (n, *field.shape))
            for name, field in self.fields.items()
        }

    def fits(self, condition: Condition) -> np.ndarray:
        """Which samples' conditions are of this kind, (n,) bool."""
        if self.encoder == BYTES:
            tokens = np.asarray(condition["tokens"])
            return ((tokens >= 0) & (tokens < BYTE_TOKENS)).all(axis=1) & (tokens[:, 0] == START)
        finite = [np.isfinite(np.asarray(value, np.float32)) for value in condition.values()]
        return np.all([part.reshape(len(part), -1).all(axis=1) for part in finite], axis=0)

    def check(self, condition: Condition) -> None:
        """Raises ConfigError for a caption that is none."""
        if not self.fits(condition).all():
            raise ConfigError("a caption's embedding holds values that are not finite; expected numbers")

    def check_data(self, stored: AnyCondition, where: str) -> None:
        """Raises ConfigError where the records of a dataset, named by `where`, do not hold this condition."""
        if not isinstance(stored, TextCondition):
            raise ConfigError(f"{where} has no captions; --text.encoder says {self.encoder}")
        if self.encoder == BYTES:
            return  # made of the captions' words, which every such dataset holds
        if not stored.encoder:
            raise ConfigError(
                f"{where} has captions that are not embedded; --text.encoder says {self.encoder}"
            )
        for name in ("encoder", "length", "channels", "pooled", "clip_widths"):
            found, asked = getattr(stored, name), getattr(self, name)
            if found != asked:
                option = f"--text.{'clip-widths' if name == 'pooled' else name.replace('_', '-')}"
                raise ConfigError(f"{where} has captions with {name} {found}; {option} says {asked}")


AnyCondition = LabelCondition | TextCondition

START = 1
BYTE_TOKENS = 258  # none, the start, and 256 bytes


def byte_tokens(captions: Sequence[str], length: int) -> np.ndarray:
    """Tokens (n, length) int32 of captions for the encoder `bytes`; what is longer is cut, between two characters."""
    tokens = np.zeros((len(captions), length), np.int32)
    for row, caption in zip(tokens, captions, strict=True):
        text = caption.encode()[: length - 1].decode(errors="ignore").encode()
        row[0], row[1 : 1 + len(text)] = START, np.frombuffer(text, np.uint8).astype(np.int32) + 2
    return tokens


def _spread(chosen: jax.Array, value: jax.Array) -> jax.Array:
    return chosen.reshape(-1, *(1,) * (value.ndim - 1))


def condition_of(config: Config) -> AnyCondition:
    """The kind of condition of a network with this resolved config."""
    text, model = config.text, config.model
    if not text.encoder:
        return LabelCondition(model.num_classes, model.class_dropout_prob)
    widths = text.clip_widths if text.encoder == SD3 else (0, 0)
    return TextCondition(
        text.encoder,
        text.length or 0,
        text.channels or 0,
        text.pooled,
        text.dropout,
        widths,
        text.encoder_dropout,
    )


def drop_labels(key: jax.Array, labels: jax.Array, num_classes: int, probability: float) -> jax.Array:
    """Labels (B,), each replaced by the null label `num_classes` with this probability."""
    if num_classes == 0 or probability == 0:
        return labels
    return jnp.where(jax.random.bernoulli(key, probability, labels.shape), num_classes, labels)


def label_numbers(names: Sequence[str], label_names: Sequence[str], num_classes: int) -> np.ndarray:
    """Class numbers of labels given by number or name; all classes for an empty list. `number:3` is no name.

    Raises ConfigError for a name that the dataset does not have, a number that is no class, and a label that may
    mean several classes: two of one name, or a name that is also the number of another.
    """
    count = max(num_classes, 1)
    if not names:
        return np.arange(count, dtype=np.int32)
    return np.asarray([_label_number(name, label_names, count) for name in names], np.int32)


def _label_number(label: str, label_names: Sequence[str], count: int) -> int:
    named = {i for i, name in enumerate(label_names) if label == name or label in re.split(r"\s*,\s*", name)}
    plain = label if named else label.removeprefix("number:")
    numbered = (
        {int(plain) if len(plain) < 20 else count} if plain.isdecimal() else set()
    )  # Python reads no longer ones
    found = sorted(named | {number for number in numbered if number < count})
    if len(found) > 1:
        raise ConfigError(
            f"--labels names {label!r}, which may be class {' or '.join(map(str, found))} by name or number; "
            "expected " + " or ".join(f"number:{number}" for number in found)
        )
    if found:
        return found[0]
    if numbered:
        raise ConfigError(f"--labels names class {plain[:40]}; expected 0 to {count - 1}")
    known = ", ".join(label_names[:10]) + (", ..." if len(label_names) > 10 else "")
    raise ConfigError(f"--labels names {label!r}; expected a class number or one of: {known or '(no names)'}")


def shared_rows(
    ours: AnyCondition, our_names: Sequence[str], theirs: AnyCondition, their_names: Sequence[str]
) -> list[tuple[int, int]]:
    """(row here, row there) of the label table's rows that stand for the same class in two runs.

    Classes are the same by name. Where a run has no names, they are if their number agrees; where a name stands
    twice, if the lists of names agree. The null row is one class more, if both have it.
    """
    if our_names and their_names and list(our_names) != list(their_names):
        there = {name: i for i, name in enumerate(their_names) if their_names.count(name) == 1}
        rows = [(i, there[n]) for i, n in enumerate(our_names) if n in there and our_names.count(n) == 1]
    else:
        rows = [(i, i) for i in range(ours.num_classes)] if ours.num_classes == theirs.num_classes else []
    if ours.class_dropout_prob > 0 and theirs.class_dropout_prob > 0:
        rows.append((ours.num_classes, theirs.num_classes))
    return rows
