"""How a command that draws samples begins and ends: options, the other processes of a launch, the exit code."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from dit_jax import processes
from dit_jax.commands import EXIT_BAD_OPTION
from dit_jax.compiler import keep_compiled_programs
from dit_jax.config import ConfigError
from dit_jax.training import launch

Args = TypeVar("Args")


def run_drawing(
    program: str,
    args: Sequence[str],
    options: type[Args],
    description: str,
    do: Callable[[Args, Callable[[], None]], int],
) -> int:
    """The exit code: that of `do`, 1: failed, 2: bad option. When one process of several fails, all end with its.

    do: is given the options and a function that joins the other processes, before any device is used.
    """
    keep_compiled_programs()
    try:
        join, rest, join_help = launch.parse_join(args, program)
        given = tyro.cli(options, args=rest, prog=program, description=f"{description}\n\n{join_help}")
        return do(given, lambda: launch.initialize(join))
    except ConfigError as error:
        return processes.end(EXIT_BAD_OPTION, f"{program}: {error}")
    except (FloatingPointError, OSError) as error:  # a disk that is full by now, say
        return processes.end(launch.EXIT_FAILED, f"{program}: {error}")
    except Exception as error:
        processes.outlive(error)
        return processes.end(launch.EXIT_FAILED, traceback.format_exc())
