"""Configs as earlier versions of the format wrote them, brought up to today's one version at a time.

| version | what changed                                                                     |
|---------|----------------------------------------------------------------------------------|
| 1       | the first; it does not say its version                                           |
| 2       | how the network is computed moved from `model` to a group of its own, `compute`; |
|         | `model` and `diffusion` say their kind                                           |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dit_jax.config.schema import ConfigError

TO_COMPUTE = ("dtype", "quantization", "attention", "norm_kernel", "remat", "unroll")


def upgraded(saved: dict[str, Any]) -> dict[str, Any]:
    """Groups of options as today's reader takes them, from a config of any version."""
    groups = dict(saved)
    version = groups.pop("version", 1)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ConfigError(
            f"version is {str(version)[:80]}; expected 1 to {VERSION}, the newest that this dit_jax reads"
        )
    for step in STEPS[version - 1 :]:
        groups = step(groups)
    if isinstance(model := groups.get("model"), dict):  # its kind was no matter of choice in version 2 either
        groups["model"] = {"kind": "dit", **model}
    return groups


def _compute_and_kinds(groups: dict[str, Any]) -> dict[str, Any]:
    for group, kind in (("model", "dit"), ("diffusion", "gaussian")):
        if isinstance(options := groups.get(group), dict):
            groups = groups | {group: {"kind": kind, **options}}
    model = groups.get("model")
    if not isinstance(model, dict) or not isinstance(groups.get("compute", {}), dict):
        return groups  # the reader says what is wrong with it
    moved = {name: value for name, value in model.items() if name in TO_COMPUTE}
    kept = {name: value for name, value in model.items() if name not in TO_COMPUTE}
    return groups | {"model": kept, "compute": groups.get("compute", {}) | moved}


# The step at index i makes version i + 2 of version i + 1.
STEPS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_compute_and_kinds,)
VERSION = 1 + len(STEPS)


def with_new_names(args: Sequence[str]) -> list[str]:
    """A command line whose options have today's names."""
    old = {f"--model.{no}{name}" for name in TO_COMPUTE for no in ("", "no-", "no_")}
    old |= {name.replace("_", "-") for name in old}

    def renamed(arg: str) -> str:
        name, equals, value = arg.partition("=")
        return name.replace("--model.", "--compute.") + equals + value if name in old else arg

    return [renamed(arg) for arg in args]


def where_it_is_now(error: TypeError) -> str:
    """What to add to the error of a recipe that gives an option to the group it was in before; else nothing."""
    for name in TO_COMPUTE:
        if f"DiTConfig.__init__() got an unexpected keyword argument '{name}'" in str(error):
            return f"; {name} is an option of compute=ComputeConfig(...) now"
    return ""
