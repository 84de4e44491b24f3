"""How the processes of a run are started and stopped.

Started: by flags, or by what Slurm, Open MPI, GKE or a TPU pod says of itself. Stopped: SIGTERM, as clusters
send before they take a machine back, or Ctrl-C lets the step finish, saves and ends with `EXIT_STOPPED`. Before there
are steps `dit_jax.signals` acts.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from dit_jax import processes
from dit_jax.config import ConfigError
from dit_jax.liveness import JAX_SECONDS
from dit_jax.signals import EXIT_INTERRUPTED as EXIT_INTERRUPTED
from dit_jax.signals import EXIT_STOPPED as EXIT_STOPPED

EXIT_FAILED = 1
EXIT_BAD_OPTION = 2
EXIT_DIVERGED = 3
EXIT_DOES_NOT_FIT = 4


class TrainingDivergedError(RuntimeError):
    """Updates stay not finite, also on other data."""


@dataclass(frozen=True)
class JoinOptions:
    """How a process finds the others."""

    coordinator: str
    num_processes: int | None
    process_index: int | None
    distributed: bool


@dataclass(frozen=True)
class LaunchOptions(JoinOptions):
    """What differs between the processes of one run, and so is no part of its config."""

    dry_run: bool
    compile_for: str
    slices: int


def parse_join(
    args: Sequence[str] | None = None, program: str = "sample.py"
) -> tuple[JoinOptions, list[str], str]:
    """(how the others are found, the arguments left, the help of the former)."""
    parser, _ = _join_parser(program)
    known, rest = parser.parse_known_args(args)
    return JoinOptions(**vars(known)), rest, parser.format_help()


def _join_parser(program: str) -> tuple[argparse.ArgumentParser, Any]:
    parser = argparse.ArgumentParser(
        prog=program, add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS
    )
    group = parser.add_argument_group("launch options")
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num-processes", type=int, metavar="N", help="processes of the run")
    group.add_argument("--process-index", type=int, metavar="I", help="this process, from 0")
    group.add_argument(
        "--distributed", action="store_true",
        help="find the other processes through TPU metadata (Slurm, Open MPI and GKE are found without it)",
    )  # fmt: skip
    return parser, group


def parse_launch(
    args: Sequence[str] | None = None, program: str = "train.py"
) -> tuple[LaunchOptions, list[str], str]:
    """(launch options, the arguments left for the config, the help of the former)."""
    parser, group = _join_parser(program)
    group.add_argument(
        "--dry-run", action="store_true",
        help="print mesh, memory, steps per epoch, checkpoint size and time to the last step; train nothing",
    )  # fmt: skip
    group.add_argument(
        "--compile-for", metavar="TOPOLOGY",
        help="compile the step for TPUs that are not here, such as v5e:16x16, and print memory, collectives and "
        "estimated speed; train nothing",
    )  # fmt: skip
    group.add_argument(
        "--slices", type=int, default=1, metavar="N",
        help="with --compile-for: N slices of that topology, joined by the data axis over the data centre's network",
    )  # fmt: skip
    known, rest = parser.parse_known_args(args)
    if known.slices < 1 or (known.slices > 1 and known.compile_for is None):
        raise ConfigError(f"--slices is {known.slices}; expected 1 or more, with --compile-for")
    if known.compile_for is not None and not known.compile_for.strip():
        raise ConfigError("--compile-for is empty; expected a topology such as v5e:16x16")
    known.compile_for = known.compile_for or ""
    return LaunchOptions(**vars(known)), rest, parser.format_help()


def initialize(options: JoinOptions) -> None:
    """Join the other processes of the run, if there are any; must come before any use of a device.

    Raises ConfigError for flags that are incomplete.
    """
    explicit = (options.coordinator, options.num_processes, options.process_index)
    if options.coordinator or options.num_processes is not None or options.process_index is not None:
        if not options.coordinator or options.num_processes is None or options.process_index is None:
            raise ConfigError(
                f"--coordinator, --num-processes and --process-index are {explicit}; expected all three or none"
            )
        if options.num_processes < 1:
            raise ConfigError(f"--num-processes is {options.num_processes}; expected 1 or more")
        if not 0 <= options.process_index < options.num_processes:
            raise ConfigError(
                f"--process-index is {options.process_index}; expected 0 to {options.num_processes - 1}"
            )
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_index,
            heartbeat_timeout_seconds=JAX_SECONDS,
        )
    elif options.distributed or _under_a_launcher():
        jax.distributed.initialize(heartbeat_timeout_seconds=JAX_SECONDS)
    processes.join_the_others()


def _under_a_launcher() -> bool:
    """Whether srun, mpirun or GKE started several processes of which this is one."""
    counts = (os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(count.isdecimal() and int(count) > 1 for count in counts) or "," in os.environ.get(
        "TPU_WORKER_HOSTNAMES", ""
    )


class StopSignal:
    """Notices SIGTERM and Ctrl-C inside a `with` block; a second Ctrl-C does what it did before the block."""

    def __init__(self) -> None:
        self._received = False
        self._several = jax.process_count() > 1

    def __enter__(self) -> StopSignal:
        # JAX's preemption service watches SIGTERM in runs of several processes and finds a common step.
        signals = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before = self._previous[signal.SIGINT]
        if self._received and number == signal.SIGINT and callable(before):
            before(number, frame)
        self._received = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # so that all processes stop at the same step

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in every process."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received
