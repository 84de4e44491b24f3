"""The commands: `dit-jax train` and so on in a shell, which are train.py and the other scripts of a clone.

A command is a module of this package with `main(program, args)`, which gives the exit code; `program` is what the
user calls it. Here it is decided which part of the house serves: a plan, a compiled program, a run. What comes before
that module is imported is in this file, which imports nothing heavy: a signal finds its handler from the start.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dit_jax import signals
from dit_jax.memory import keep_freed_memory

EXIT_FAILED, EXIT_BAD_OPTION = 1, 2
_GO_ON = "the same command goes on from the last checkpoint"


@dataclass(frozen=True)
class Command:
    """What is known of a command before it is imported.

    Attributes:
      summary: what it does, in a line.
      interrupted: what is said at Ctrl-C; `stopped`: at SIGTERM (empty: the system's way).
      steps: whether it computes step after step, so that freed memory is worth keeping.
    """

    summary: str
    interrupted: str = "interrupted"
    stopped: str = ""
    steps: bool = False


COMMANDS = {
    "train": Command(
        "train a Diffusion Transformer on a latent dataset",
        f"interrupted; {_GO_ON}",
        f"asked to stop; {_GO_ON}",
        steps=True,
    ),
    "sample": Command("draw pictures from a trained run", steps=True),
    "prepare": Command(
        "encode images into a latent dataset, or inspect one", "interrupted; the same command goes on"
    ),
    "evaluate": Command("measure samples against a reference, or a network's likelihood"),
    "convert": Command("turn weights of one format into another"),
}


def run(name: str, program: str, args: Sequence[str] | None = None) -> int:
    """Run a command in this process, with the process's arguments where no others are given; its exit code.

    What a store refuses, or does not answer, is one sentence, whatever the command was doing.
    """
    command = COMMANDS[name]
    signals.leave_on_signals(program, command.interrupted, command.stopped)
    if command.steps:
        keep_freed_memory()  # before NumPy and JAX start threads
    signals.watch()
    try:
        code: int = importlib.import_module(f"{__name__}.{name}").main(
            program, list(sys.argv[1:] if args is None else args)
        )
    except OSError as error:
        from dit_jax import buckets, processes

        if not isinstance(error, buckets.BucketError):
            raise
        return processes.end(EXIT_FAILED, f"{program}: {error}")
    return code


def main(args: Sequence[str] | None = None) -> int:
    """The command that the first argument names, with the rest; the exit code."""
    name, *rest = (sys.argv[1:] if args is None else args) or [""]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name not in COMMANDS:
        found = f"{name[:80]!r} is no command" if name else "no command is given"
        print(f"dit-jax: {found}; expected {', '.join(COMMANDS)} or --help", file=sys.stderr)
        return EXIT_BAD_OPTION
    return run(name, f"dit-jax {name}", rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: dit-jax COMMAND [options]", "", *lines, "", "dit-jax COMMAND --help explains its options."]
    )
