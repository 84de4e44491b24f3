"""SIGTERM and Ctrl-C at any moment: one line and an exit code, whatever the process is doing.

A script calls `leave_on_signals` before its heavy imports, and `watch` once malloc is set up (`dit_jax.memory`).
Python runs a handler only between two of its own instructions, and compiling or waiting for other processes may be
one of them: the thread of `watch` does not wait for it. The process ends without unwinding, which halfway through an
import or with a library's threads half shut down gives tracebacks, or a crash.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
EXIT_INTERRUPTED = 130  # as shells say of SIGINT

_lines: dict[int, tuple[int, str]] = {}  # signal -> exit code and what is said
_leaving = threading.Lock()
unfinished: set[str] = set()
"""Files and folders that are removed where the process ends without unwinding."""


def leave_on_signals(program: str, interrupted: str, stopped: str = "") -> None:
    """From now on Ctrl-C ends this process with 130 and, where `stopped` is given, SIGTERM with 75.

    Both are what is said, after the program's name. Whoever sets another handler with `signal.signal` has its way.
    """
    _lines[signal.SIGINT] = (EXIT_INTERRUPTED, f"{program}: {interrupted}")
    if stopped:
        _lines[signal.SIGTERM] = (EXIT_STOPPED, f"{program}: {stopped}")
    for number in _lines:
        signal.signal(number, _leave)


def watch() -> None:
    """Start the thread that acts on signals while the main thread is in a call that takes long.

    It ends the process at a second Ctrl-C whatever the handler is.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)

    def act() -> None:
        interruptions = 0
        while True:
            (number,) = os.read(read, 1)
            interruptions += number == signal.SIGINT
            if interruptions > 1 or signal.getsignal(number) is _leave:
                _leave(number)

    threading.Thread(target=act, name="signals", daemon=True).start()
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C is a KeyboardInterrupt: for work that leaves more behind than a file."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def remove_unfinished() -> None:
    """Before an end without unwinding."""
    for path in list(unfinished):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def _end(code: int, line: str) -> None:
    os.write(2, f"{line}\n".encode())
    os._exit(code)


end: Callable[[int, str], object] = _end
"""How a process ends: `dit_jax.processes` puts in what ends those of one run together."""


def _leave(number: int, _: object = None) -> None:
    if number not in _lines or not _leaving.acquire(blocking=False):
        return  # the main thread and the other may both come here
    remove_unfinished()
    end(*_lines[number])
