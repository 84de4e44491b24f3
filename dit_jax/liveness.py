"""Processes of a run that are gone without a word, killed or with their host: the others would wait for them.

Each tells the store of keys that process 0 keeps how often it has looked at it; process 0 sees whose number stands
still. The others see that the store does not answer. Looks are counted, not seconds: a process that was suspended
itself suspects nobody.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any

from dit_jax import signals

LOOK_SECONDS = 2.0
LOOKS = 15  # without a word, after which a process is gone
PATIENCE_SECONDS = LOOK_SECONDS * (LOOKS + 3)  # within them it is known who is gone
# Of silence, until JAX aborts the processes by itself: where Python's threads do not run. It hears of a process twice
# in this time: half of it may be over when one is killed, and what is left must be longer than it takes here.
JAX_SECONDS = 100
_KEY = "dit_jax/alive"


class RollCall:
    """Who of the processes 1 to `count` - 1 is silent."""

    def __init__(self, count: int) -> None:
        self._said: dict[str, str] = {}
        self._silent = {str(index): 0 for index in range(1, count)}

    def look(self, said: Iterable[tuple[str, str]]) -> list[int]:
        """`said` are pairs (anything/index, what it says now); those who say the same in the last LOOKS looks."""
        now = {key.rpartition("/")[2]: text for key, text in said}
        for index in self._silent:
            same = now.get(index) == self._said.get(index)
            self._silent[index] = self._silent[index] + 1 if same else 0
        self._said = now
        return [int(index) for index, looks in self._silent.items() if looks >= LOOKS]


class Presence:
    """Two threads of a process: one tells that it is there, one notices when nobody listens."""

    def __init__(self, store: Any, index: int, count: int, end: Callable[[list[int], str], object]) -> None:
        """`end` is given who is gone and what to say, and ends all that are left, through the store."""
        self._store, self._index, self._count, self._end = store, index, count, end
        self._roll, self._unanswered, self._over = RollCall(count), 0, threading.Event()
        does = (self._listen,) if index == 0 else (self._tell, self._judge)
        self._threads = [threading.Thread(target=do, name=do.__name__, daemon=True) for do in does]

    def start(self) -> None:
        """From now on."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when neither thread uses the store any more."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _listen(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            try:
                said = self._store.key_value_dir_get(_KEY)
            except Exception:  # nobody has said anything yet
                said = []
            silent = self._roll.look(said)
            if silent:
                self._end(silent, gone(silent, self._count))

    def _tell(self) -> None:
        number = 0
        while not self._over.wait(LOOK_SECONDS):
            number += 1
            try:
                self._store.key_value_set(f"{_KEY}/{self._index}", str(number), allow_overwrite=True)
            except Exception:
                continue
            self._unanswered = 0

    def _judge(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self._unanswered += 1
            if self._unanswered > LOOKS:
                _end_alone(gone([0], self._count))


def gone(silent: list[int], count: int) -> str:
    """The sentence."""
    who = ", ".join(map(str, silent))
    return (
        f"process {who} of {count} is gone: nothing has been heard of it for {LOOK_SECONDS * LOOKS:g} seconds; "
        "the same command goes on from what is saved"
    )


def _end_alone(line: str) -> None:
    os.write(2, f"{line}\n".encode())
    signals.remove_unfinished()
    os._exit(signals.EXIT_STOPPED)


_handlers: list[Any] = []  # as long as C may call them


def outlive_the_lead(address: str, count: int) -> None:
    """JAX aborts a process as soon as the connection to process 0 breaks: from now on this is said, and ends with 75.

    It takes no callback of Python's for this (jaxlib throws bad_cast), so the signal is caught; Python's own handlers
    would run after it. Other aborts stay what they are.
    """
    host, _, port = address.rpartition(":")

    def aborted(_: int) -> None:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            _end_alone(
                f"process 0 of {count} is gone: {address}, where it listened, does not answer; "
                "the same command goes on from what is saved"
            )

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    _handlers.append(handler)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
