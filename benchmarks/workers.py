"""Each side of a comparison in a process of its own: no side's threads, memory or settings touch another's.

A script starts itself once per side, with --side and the options that make the side what it is. Each prepares, then
waits on a pipe for the name of the work to do and answers with the seconds it took, so that rounds go in turns. A
side is timed when the others have come to rest: threads that wait for work may spin for a while after they had some.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Work = Mapping[str, Callable[[], Any]]
ENVIRONMENT = "environment"  # asked for like a piece of work

# What makes a processor with AVX-512 compute as one without: XLA's flags, then those of PyTorch's libraries. YNNPACK,
# which multiplies for XLA, asks the processor and not the first flag. The second does without it: XLA is then slower
# than on a processor without AVX-512.
WITHOUT_AVX512 = {
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2 --xla_cpu_experimental_ynn_fusion_type=",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


@dataclass(frozen=True)
class Side:
    """One side: its name in the result, what it is (a --side) and the options that it adds to the command line's.

    optional: it is left out where it fails to start, such as a compiled one without a compiler.
    """

    name: str
    kind: str
    options: tuple[str, ...] = ()
    optional: bool = False


def add_options(new: argparse.ArgumentParser, peers: Sequence[str], default: str = "none") -> None:
    """Options of every script that compares."""
    new.add_argument("--peer", default=default, choices=peers)
    new.add_argument("--peer-compile", default="both", choices=("both", "none", "default", "max-autotune"),
                     help="torch.compile of the peer; both: none and default, the faster one counts")  # fmt: skip
    new.add_argument("--only", default="both", choices=("both", "jax", "peer"))
    new.add_argument("--isa", default="native", choices=("native", "avx2"), help="what both may use of a CPU")
    new.add_argument("--side", choices=("reference", "jax", "peer"), help=argparse.SUPPRESS)
    new.add_argument("--exchange", type=pathlib.Path, help=argparse.SUPPRESS)


def sides(args: argparse.Namespace, variants: Mapping[str, tuple[str, ...]] | None = None) -> list[Side]:
    """The sides that the options ask for; variants: further ways to run the peer, name suffix -> options."""
    found = [Side("jax", "jax")] if args.only != "peer" else []
    if args.peer == "none" or args.only == "jax":
        return found
    modes = {"": "none", "-compiled": "default"} if args.peer_compile == "both" else {"": args.peer_compile}
    for suffix, options in (variants or {"": ()}).items():
        for compiled, mode in modes.items():
            name = f"{args.peer}{suffix}{compiled}"
            more = (*options, "--peer-compile", mode)
            found.append(Side(name, "peer", more, optional=compiled != ""))
    return found


# ------------------------------------------------------------------------------------------ in a worker


def serve(prepare: Callable[[], tuple[dict[str, Any], Work]], environment: Callable[[], Any]) -> None:
    """Prepare, do all the work once, tell the facts, then do what the lines of the standard input name."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    facts, work = prepare()
    for run in work.values():  # compiles what is compiled at its first run
        run()

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer(facts)
    for line in sys.stdin:
        name = json.loads(line)
        if name == ENVIRONMENT:
            answer(environment())
            continue
        start = time.perf_counter()
        work[name]()
        answer(time.perf_counter() - start)


# ------------------------------------------------------------------------------------------- the parent


class Worker:
    """A side's process. `facts` is what it found while it prepared."""

    def __init__(self, side: Side, isa: str, exchange: str) -> None:
        self.side = side
        more = ("--side", side.kind, "--exchange", exchange, *side.options)
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:], *more],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment(isa, side.kind),
        )  # fmt: skip
        self.facts: dict[str, Any] = self.answer()

    def ask(self, what: str) -> Any:
        """What it answers to a line."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says so
            print(json.dumps(what), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        """Its next answer; ChildProcessError where it has ended, whose words are on the standard error."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise ChildProcessError(code, f"{self.side.name} ended with code {code}")
        return json.loads(line)

    def cpu_seconds(self) -> float:
        """CPU time of its process so far (clock_getcpuclockid of Linux; elsewhere 0)."""
        return time.clock_gettime((~self.process.pid << 3) | 2) if sys.platform == "linux" else 0.0

    def come_to_rest(self, patience: float = 60.0) -> None:
        """Return when none of its threads runs or could run (seen on Linux), or when patience ends."""
        end = time.monotonic() + patience
        while time.monotonic() < end and _runnable_threads(self.process.pid):
            time.sleep(0.005)

    def close(self) -> None:
        """End the process."""
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert stream is not None
                stream.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _runnable_threads(pid: int) -> int:
    """Threads of a process in state R of proc(5)."""
    states = []
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            states.append(path.read_text().rpartition(")")[2].split()[0])
    return states.count("R")


def _environment(isa: str, kind: str) -> dict[str, str]:
    """A side's environment."""
    new = dict(os.environ)
    if isa == "avx2":
        flags = f"{new.get('XLA_FLAGS', '')} {WITHOUT_AVX512['XLA_FLAGS']}".strip()
        new |= WITHOUT_AVX512 | {"XLA_FLAGS": flags}
    if kind == "peer":  # JAX only says what the device is
        new.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return new


@contextlib.contextmanager
def started(args: argparse.Namespace, wanted: Sequence[Side], reference: bool) -> Iterator[list[Worker]]:
    """The workers, ready; those that are optional and failed are left out. SystemExit where another failed.

    reference: one of kind "reference" runs before them, and leaves what they compare with in the exchange folder.
    """
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as exchange:
        try:
            if reference:
                Worker(Side("reference", "reference"), args.isa, exchange).close()
            for side in wanted:
                try:
                    workers.append(Worker(side, args.isa, exchange))
                except ChildProcessError as error:
                    if not side.optional:
                        raise
                    print(f"{error.strerror}: it is left out", file=sys.stderr)
            yield workers
        except ChildProcessError as error:
            # What it said of an error is the last word; one that was killed said nothing.
            sys.exit(1 if error.errno and error.errno > 0 else error.strerror)
        finally:
            for worker in workers:
                worker.close()


@dataclass(frozen=True)
class Rounds:
    """What was measured of each side, round by round: seconds, and CPU seconds of its process (0 but on Linux).

    waiting_cores: the most that sides which waited used of the CPU meanwhile, in cores.
    """

    times: dict[str, list[float]]
    cpu_times: dict[str, list[float]]
    waiting_cores: float


def in_turns(workers: Sequence[Worker], work: str, rounds: int, warmup: int = 1) -> Rounds:
    """The rounds of all sides, A B A B."""
    found = Rounds({w.side.name: [] for w in workers}, {w.side.name: [] for w in workers}, 0.0)
    waiting = 0.0
    for i in range(warmup + rounds):
        for worker in workers:
            others = [other for other in workers if other is not worker]
            for other in others:
                other.come_to_rest()
            before, idle = worker.cpu_seconds(), sum(other.cpu_seconds() for other in others)
            seconds = worker.ask(work)
            if i >= warmup:
                found.times[worker.side.name].append(seconds)
                found.cpu_times[worker.side.name].append(worker.cpu_seconds() - before)
                waiting = max(waiting, (sum(other.cpu_seconds() for other in others) - idle) / seconds)
    return replace(found, waiting_cores=waiting)


def fastest_peer(times: Mapping[str, list[float]]) -> str | None:
    """The name of the peer that counts, None without any."""
    peers = {name: statistics.median(seconds) for name, seconds in times.items() if name != "jax"}
    return min(peers, key=lambda name: peers[name]) if peers else None
