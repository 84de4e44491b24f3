"""Configs as people give them: recipes, which are Python files, and the command line."""

from __future__ import annotations

import os
import pathlib
import runpy
import traceback
from collections.abc import Sequence
from typing import Any

from dit_jax.config.check import resolve, typed
from dit_jax.config.saved import from_json, shown
from dit_jax.config.schema import Config, ConfigError
from dit_jax.config.upgrade import where_it_is_now, with_new_names

DEFAULT = "configs/digits.py"

_CLONE = pathlib.Path(__file__).parents[2]  # where train.py and configs/ lie, unless the package is installed
_INSTALLED = pathlib.Path(__file__).parents[1] / "recipes"  # setup.py puts configs/ there
RECIPES = _INSTALLED if _INSTALLED.is_dir() else _CLONE / "configs"


def load(path: str | os.PathLike[str]) -> Config:
    """A config from a recipe (.py, which defines `config`) or from a saved config (.json).

    A relative path starts from the working directory, or else from the folder of the scripts; the recipes of the
    project also have names: digits, or configs/digits.py wherever the package lies. Raises ConfigError for a file
    that is neither.
    """
    named, path = path, pathlib.Path(path)
    places = (path, *([] if RECIPES == _INSTALLED else [_CLONE / path]), *_named(path))
    path = next((place for place in places if os.path.isfile(place)), path)
    if "://" in os.fspath(named):
        raise ConfigError(f"--config names {os.fspath(named)[:200]}; expected a recipe on a disk, or a name")
    if not os.path.isfile(path):
        raise ConfigError(
            f"--config names {os.fspath(named)[:200] or 'nothing'}, which is not a file; expected a recipe such as "
            f"{DEFAULT}, or a name: {', '.join(sorted(recipe.stem for recipe in RECIPES.glob('[!_]*.py')))}"
        )
    if path.suffix == ".json":
        try:
            return from_json(path.read_text())
        except (OSError, ValueError) as error:  # ConfigError, or bytes that are no text
            raise ConfigError(f"--config names {path}, which cannot be read: {error}") from None
    found = _run(path).get("config")
    if not isinstance(found, Config):
        raise ConfigError(f"{path} defines config = {shown(found)}; expected a dit_jax.config.Config")
    return found


def _named(path: pathlib.Path) -> list[pathlib.Path]:
    """Where a recipe of the project lies, given as NAME or configs/NAME.py."""
    if path.parent == pathlib.Path("configs") and path.suffix == ".py":
        return [RECIPES / path.name]
    return [RECIPES / f"{path}.py"] if len(path.parts) == 1 and not path.suffix else []


def run_config(option: str, folder: str | pathlib.Path) -> Config:
    """The resolved config of the run in `folder`, which `option` names.

    Raises ConfigError where there is none, or where config.json is not what training wrote.
    """
    path = (pathlib.Path(folder) if isinstance(folder, str) else folder) / "config.json"
    if not (os.path.isfile(path) if isinstance(path, pathlib.Path) else path.is_file()):
        raise ConfigError(
            f"{option} is {str(folder)[:200]}, which has no config.json; expected the folder of a trained run"
        )
    try:
        return resolve(from_json(path.read_text()))
    except (OSError, ValueError) as error:  # ConfigError, or bytes that are no text
        raise ConfigError(f"{path} cannot be used ({error}); expected it as training wrote it") from None


def _run(path: pathlib.Path) -> dict[str, Any]:
    """What a recipe defines; whatever stops it is a ConfigError that says where."""
    try:
        return runpy.run_path(os.fspath(path))
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [str(frame.lineno) for frame in frames if frame.filename == os.fspath(path)]
        where = f" in line {lines[-1]}" if lines else ""  # a SyntaxError says it itself
        reason = " ".join(f"{type(error).__name__}{where}: {error}".split())
        hint = where_it_is_now(error) if isinstance(error, TypeError) else ""
        raise ConfigError(
            f"--config names {path}, which does not run as a recipe ({reason}{hint}); expected one such as {DEFAULT}"
        ) from None


def parse_args(
    args: Sequence[str] | None = None,
    default: str = DEFAULT,
    more_help: str = "",
    program: str | None = None,
) -> Config:
    """The config of a command line: a recipe named by --config, then one option per override, resolved.

    more_help describes options that the caller has taken out of `args`; program is what the user called.
    """
    import argparse
    import sys

    import tyro

    first = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=default)
    known, rest = first.parse_known_args(sys.argv[1:] if args is None else list(args))
    recipe = typed(load(known.config))  # tyro would answer a wrong default with a page
    config = tyro.cli(
        Config,
        args=_spell_unroll(with_new_names(_without_kinds(rest, recipe))),
        prog=program,
        default=recipe,
        config=(tyro.conf.AvoidSubcommands,),  # the recipe's kinds are those whose options there are
        description=f"{Config.__doc__}\n\n--config FILE or NAME: a recipe in configs/ (default: {default}); every "
        f"option below overrides it.\n\n{more_help}",
    )
    return resolve(config)


def _without_kinds(args: Sequence[str], recipe: Config) -> list[str]:
    """The options without those of kinds: they may name the recipe's own. ConfigError for another."""
    words = [part for arg in args for part in (arg.split("=", 1) if ".kind=" in arg else [arg])]
    for group in ("model", "diffusion"):
        option, own = f"--{group}.kind", getattr(recipe, group).kind
        while option in words:
            at = words.index(option)
            if words[at + 1 : at + 2] != [own]:
                raise ConfigError(
                    f"{option} is {' '.join(words[at + 1 : at + 2])[:80] or 'empty'}; the recipe that --config names "
                    f"is of kind {own}: expected a recipe of the kind that is wanted"
                )
            del words[at : at + 2]
    return words


def _spell_unroll(args: Sequence[str]) -> list[str]:
    """The options with --compute.unroll as tyro reads a choice of three: it may also be given as a switch."""
    words = []
    for arg in args:
        words += arg.split("=", 1) if arg.startswith("--compute.unroll=") else [arg]
    spelt = []
    for before, word, after in zip(["", *words], words, [*words[1:], "--"], strict=False):
        if word in ("--compute.no-unroll", "--compute.no_unroll"):
            spelt += ["--compute.unroll", "False"]
        elif word == "--compute.unroll":
            spelt += [word, *(["True"] if after.startswith("--") else [])]
        else:
            spelt.append(word.capitalize() if before == "--compute.unroll" and word != "auto" else word)
    return spelt
