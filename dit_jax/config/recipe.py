"""Configs as people give them: recipes, which are Python files, and the command line."""

from __future__ import annotations

import pathlib
import runpy
from collections.abc import Sequence

from dit_jax.config.check import resolve
from dit_jax.config.saved import from_json
from dit_jax.config.schema import Config, ConfigError


def load(path: str | pathlib.Path) -> Config:
    """A config from a recipe (.py, which defines `config`) or from a saved config (.json)."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConfigError(
            f"--config names {path}, which is not a file; expected a recipe such as configs/digits.py"
        )
    if path.suffix == ".json":
        return from_json(path.read_text())
    found = runpy.run_path(str(path)).get("config")
    if not isinstance(found, Config):
        raise ConfigError(f"{path} defines config = {found!r}; expected a dit_jax.config.Config")
    return found


def parse_args(
    args: Sequence[str] | None = None, default: str = "configs/digits.py", more_help: str = ""
) -> Config:
    """The config of a command line: a recipe named by --config, then one option per override, resolved.

    more_help describes options that the caller has taken out of `args`.
    """
    import argparse
    import sys

    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=default)
    known, rest = first.parse_known_args(sys.argv[1:] if args is None else list(args))
    config = tyro.cli(
        Config,
        args=_spell_unroll(rest),
        default=load(known.config),
        description=f"{Config.__doc__}\n\n--config FILE names a recipe in configs/ (default: {default}); every "
        f"option below overrides it.\n\n{more_help}",
    )
    return resolve(config)


def _spell_unroll(args: Sequence[str]) -> list[str]:
    """The options with --model.unroll as tyro reads a choice of three: it may be given as a switch, which it was."""
    words = []
    for arg in args:
        words += arg.split("=", 1) if arg.startswith("--model.unroll=") else [arg]
    spelt = []
    for before, word, after in zip(["", *words], words, [*words[1:], "--"], strict=False):
        if word in ("--model.no-unroll", "--model.no_unroll"):
            spelt += ["--model.unroll", "False"]
        elif word == "--model.unroll":
            spelt += [word, *(["True"] if after.startswith("--") else [])]
        else:
            spelt.append(word.capitalize() if before == "--model.unroll" and word != "auto" else word)
    return spelt
