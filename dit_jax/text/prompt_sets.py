"""Sets of prompts, in the files that benchmarks give them in.

| file                     | what it is                                                                     |
|--------------------------|--------------------------------------------------------------------------------|
| text                     | a prompt a line; blank lines are none                                          |
| .jsonl                   | a record a line with `prompt`, as GenEval's evaluation_metadata.jsonl          |
| a folder of .txt         | a prompt a file, whose name is its own, as DPG-Bench's prompts                 |
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

from dit_jax import paths
from dit_jax.config import ConfigError
from dit_jax.config.saved import shown


@dataclass(frozen=True)
class PromptSet:
    """Prompts in their order.

    Attributes:
      captions: the prompts.
      records: of .jsonl, each prompt's line.
      names: of a folder, each prompt's file without its ending.
    """

    captions: tuple[str, ...]
    records: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def read_prompts(option: str, place: str) -> PromptSet:
    """The prompts in a file or folder that `option` names; ConfigError where there are none or it cannot be read."""
    path = paths.from_user(place)
    try:
        if paths.is_folder(path):
            found = _of_folder(path)
        elif not paths.is_file(path):  # a pipe would be waited for
            raise OSError("it is no file")
        else:
            lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
            found = _of_records(lines) if path.suffix == ".jsonl" else PromptSet(tuple(lines))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{option} is {shown(place)}, which cannot be read ({error}); expected a file of UTF-8 text, a prompt "
            "a line, a .jsonl with a prompt in each record, or a folder with a .txt for each prompt"
        ) from None
    if not found.captions:
        raise ConfigError(f"{option} is {place}, which holds no prompt; expected one a line")
    return found


def _of_records(lines: list[str]) -> PromptSet:
    captions = []
    for number, line in enumerate(lines, 1):
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(f"record {number} has no prompt")
        captions.append(record["prompt"])
    return PromptSet(tuple(captions), records=tuple(lines))


def _of_folder(folder: pathlib.Path) -> PromptSet:
    files = [folder / name for name in paths.names_in(folder) if name.endswith(".txt")]
    captions = tuple(file.read_text("utf-8-sig").strip() for file in files)
    empty = next((file for file, caption in zip(files, captions, strict=True) if not caption), None)
    if empty is not None:
        raise ValueError(f"{empty.name} is empty")
    return PromptSet(captions, names=tuple(file.stem for file in files))
