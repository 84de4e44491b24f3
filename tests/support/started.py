"""Processes that tests start: what they say is kept, all of it is shown when one fails, and none is left behind."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).parents[2]
LONG = 400.0  # seconds that a test waits for what takes seconds on a machine with nothing else to do
ATTEMPTS = 3
# What says that a start came to nothing: Gloo's patience, and a port that somebody else has taken meanwhile.
AGAIN = ("Gloo context initialization failed", "Failed to add port to server")
_left: list["Process"] = []


def environment(devices: int = 1) -> dict[str, str]:
    """That of a process on so many CPU devices, whose programs are the tests' kept ones, or compiled in a hurry.

    What takes part in a run of several processes compiles all by itself (JAX keeps process 0's programs alone):
    without the compiler's optimizations that takes a fifth of the time.
    """
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache/jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }


class Process(subprocess.Popen):
    """`python ARGUMENTS` in the root of the project. It writes to files: it never waits for a reader."""

    def __init__(self, *arguments: object, devices: int):
        self._files = out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, *map(str, arguments)]
        super().__init__(command, cwd=ROOT, env=environment(devices), stdout=out, stderr=err)
        _left.append(self)

    @property
    def out(self) -> str:
        """What it has written on stdout so far."""
        return _read(self._files[0])

    @property
    def err(self) -> str:
        """What it has written on stderr so far."""
        return _read(self._files[1])

    @property
    def said(self) -> str:
        """Both."""
        return self.out + self.err

    def end(self) -> None:
        """Kill it, if it still runs, and forget what it said."""
        self.kill()
        self.wait()
        for file in self._files:
            file.close()


def _read(file) -> str:
    """All of the file, whose position is also that at which the process writes."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def end_all() -> None:
    """Kill what still runs."""
    while _left:
        _left.pop().end()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*arguments: object, devices: int = 1) -> Process:
    """`python ARGUMENTS` on so many virtual CPU devices. What still runs when the test ends is killed."""
    return Process(*arguments, devices=devices)


def wait_for(happened: Callable[[], bool], *processes: Process) -> None:
    """Return when happened() is true, as it gets while these run. Raises AssertionError when one has ended."""
    end = time.monotonic() + LONG
    while not happened():
        ended = [process for process in processes if process.poll() is not None]
        assert not ended and time.monotonic() < end, _story(processes)
        time.sleep(0.02)


def finish(*processes: Process, code: int | Sequence[int] = 0) -> list[Process]:
    """These, when they have ended. Raises AssertionError if not all did so with that code, or with those codes."""
    end, codes = time.monotonic() + LONG, [code] * len(processes) if isinstance(code, int) else list(code)
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise AssertionError(f"after {LONG:.0f} s\n{_story(processes)}") from None
    assert [process.returncode for process in processes] == codes, _story(processes)
    return list(processes)


def _story(processes: Sequence[Process]) -> str:
    return "".join(
        f"----- process {i}: {'runs' if process.poll() is None else process.returncode}\n{process.said}\n"
        for i, process in enumerate(processes)
    )


def together(
    arguments: Callable[[str, int], Sequence[object]],
    count: int = 2,
    *,
    devices: int = 1,
    code: int | Sequence[int] = 0,
    meanwhile: Callable[..., object] = lambda *processes: None,
) -> list[Process]:
    """`count` processes of one run, when they have ended: `arguments(address, index)` are those of each of them.

    `meanwhile(*processes)` is called when all are started. Gloo gives a process 30 s to come to where the others
    are; on a loaded machine it may take longer: then all are started again, `arguments` first. So they are where
    their port was taken before they came to it.
    """
    for attempt in range(ATTEMPTS):
        address = f"127.0.0.1:{free_port()}"
        commands = [arguments(address, index) for index in range(count)]
        processes = [start(*command, devices=devices) for command in commands]
        try:
            meanwhile(*processes)
            return finish(*processes, code=code)
        except AssertionError:
            gave_up = any(words in process.said for process in processes for words in AGAIN)
            if attempt == ATTEMPTS - 1 or not gave_up:
                raise
            for process in processes:
                process.kill()
                process.wait()
    raise AssertionError


def joined(
    *arguments: object, own: Sequence[Sequence[object]] = ((), ())
) -> Callable[[str, int], list[object]]:
    """For `together`: a script whose processes are told of each other; `own` are arguments of one of them alone."""

    def of_one(address: str, index: int) -> list[object]:
        join = ("--coordinator", address, "--num-processes", len(own), "--process-index", index)
        return [*arguments, *join, *own[index]]

    return of_one
