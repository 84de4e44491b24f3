"""Emergency copies: the state on the hosts' own disks or in their memory, newer than the last checkpoint.

    FOLDER/dit_jax-RUN/STEP.PROCESS     SHA-256 of the rest, length of the header, header (JSON), pieces

A piece is what one device holds of one array. Each lies with two processes, on two hosts where there are two: with
two that hold it, or, where one host alone does, also with another, to whose devices it is permuted. The loss of a
host loses none.
A copy fits as many processes and the mesh that made it, on whichever hosts its files lie. (Orbax's emergency manager
wants two replicas of the whole state, each on a slice of its own: zero1 has none, nor has fsdp on one slice.)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import pathlib
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dit_jax.config import ConfigError
from dit_jax.files import whole_file, write_whole
from dit_jax.processes import gather, on_lead
from dit_jax.runs.checkpoint import say
from dit_jax.runs.state import TrainState

KEPT = 2  # beside the one that is being written: another process may be one behind
Piece = tuple[int, tuple[tuple[int, int], ...]]  # number of the array, bounds in each dimension
Pieces = dict[Piece, np.ndarray]
MEMORY = pathlib.Path("/dev/shm")


def _bounds(index: Iterable[slice], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


@dataclass(frozen=True)
class Layout:
    """Where the pieces of a state lie.

    Attributes:
      key: what two layouts that fit each other have in common.
      holders: piece -> the processes with a device that holds it.
      writers: piece -> the processes that write it.
      moved: numbers of the arrays that are permuted to other processes.
      stride: from a process to that whose devices they go to, on another host where there is one.
    """

    key: str
    holders: dict[Piece, list[int]]
    writers: dict[Piece, set[int]]
    moved: set[int]
    stride: int

    @staticmethod
    def of(like: TrainState, hosts: Sequence[str]) -> Layout:
        """The layout of a state, or of its shapes with shardings; `hosts` are the names of the processes' hosts."""
        count, places = len(hosts), [hosts.index(host) for host in hosts]
        if len(set(places)) == 1:
            places = list(range(count))  # one host: processes stand for hosts
        apart = (n for n in range(1, count) if all(places[p] != places[p - n] for p in range(count)))
        stride = next(apart, 1)
        holders: dict[Piece, list[int]] = {}
        writers: dict[Piece, set[int]] = {}
        moved, said = set(), [str(jax.tree.structure(like)), str(places)]
        for number, leaf in enumerate(jax.tree.leaves(like)):
            found: dict[Piece, set[int]] = {}
            for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
                found.setdefault((number, _bounds(index, leaf.shape)), set()).add(device.process_index)
            if count > 1 and any(len({places[p] for p in processes}) == 1 for processes in found.values()):
                moved.add(number)
            said.append(
                f"{leaf.shape} {leaf.dtype} {sorted((p[1], sorted(who)) for p, who in found.items())}"
            )
            for piece, processes in found.items():
                holders[piece] = who = sorted(processes)
                first = who[len(writers) % len(who)]  # in turn
                second = (first + stride) % count
                if number not in moved:  # another host's, if there is another one
                    second = next((p for p in who if places[p] != places[first]), first)
                writers[piece] = {first, second}
        return Layout(hashlib.sha256("\n".join(said).encode()).hexdigest(), holders, writers, moved, stride)

    def covered(self, writers: set[int]) -> bool:
        """Whether the files of these processes hold every piece."""
        return all(who & writers for who in self.writers.values())


class Copies:
    """The copies of one run, as this process sees them."""

    def __init__(self, workdir: pathlib.Path, folder: str, like: TrainState) -> None:
        """`folder` is an option (empty: memory where it has room, else the system's temporary folder)."""
        self._layout = Layout.of(like, gather(socket.gethostname()))
        self._like, self._me = like, jax.process_index()
        leaves = jax.tree.leaves(like)
        size = sum(
            leaves[number].dtype.itemsize * math.prod(b - a for a, b in bounds)
            for (number, bounds), who in self._layout.writers.items()
            if self._me in who
        )
        where = pathlib.Path(folder) if folder else _roomy((KEPT + 1) * size)
        self.folder = where / f"dit_jax-{_name_of(workdir)}"
        self._writing: threading.Thread | None = None
        self._problem: Exception | None = None
        self._shift = _Shift(leaves[0].sharding.mesh, self._layout.stride) if self._layout.moved else None
        for left in self.folder.glob(f".*.{self._me}.*"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()

    # ---------------------------------------------------------------------------------------- taking

    def take(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Copy the state to the host, and start writing it. A failure (a full disk, say) is one line."""
        pieces = self._pieces(state)
        self.settle()
        for old in self._files(self._me)[:-KEPT]:
            old.unlink(missing_ok=True)
        step = int(state.step)
        head = {"step": step, "layout": self._layout.key, "meta": meta, "pieces": list(pieces)}
        arguments = (self.folder / f"{step:09d}.{self._me}", head, list(pieces.values()))
        self._writing = threading.Thread(target=self._write, args=arguments, name="copies", daemon=True)
        self._writing.start()

    def _pieces(self, state: TrainState) -> Pieces:
        """What this process writes, on the host; its own memory, as the next step takes the devices' back."""
        found: Pieces = {}
        leaves = jax.tree.leaves(state)
        jax.copy_to_host_async([shard.data for leaf in leaves for shard in leaf.addressable_shards])
        for number, leaf in enumerate(leaves):
            for shard in leaf.addressable_shards:
                self._keep(found, (number, _bounds(shard.index, leaf.shape)), shard.data)
            if self._shift is not None and number in self._layout.moved:
                there = leaf.sharding.devices_indices_map(leaf.shape)
                for shard in self._shift.program(leaf.sharding.spec)(leaf).addressable_shards:
                    index = there[self._shift.came_from[shard.device]]
                    self._keep(found, (number, _bounds(index, leaf.shape)), shard.data)
        return found

    def _keep(self, found: Pieces, piece: Piece, data: Any) -> None:
        if self._me in self._layout.writers[piece] and piece not in found:
            found[piece] = np.array(data)

    def _write(self, path: pathlib.Path, head: dict[str, Any], arrays: list[np.ndarray]) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            text = json.dumps(head).encode()
            digest = hashlib.sha256()
            with whole_file(path) as beside, beside.open("wb") as file:
                file.write(bytes(digest.digest_size))
                bodies = [array.reshape(-1).view(np.uint8) for array in arrays]
                parts: list[Any] = [len(text).to_bytes(8, "little"), text, *bodies]
                for part in parts:
                    digest.update(part)
                    file.write(part)
                file.seek(0)
                file.write(digest.digest())
        except OSError as error:
            self._problem = error

    def settle(self) -> None:
        """Return when nothing is being written; a failure is reported."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        problem, self._problem = self._problem, None
        if problem is not None:
            _tell(f"a copy could not be written to {self.folder} ({problem}); training goes on without it")

    def drop(self, after: int = -1) -> None:
        """Remove the copies of later steps, and of processes that are no more: they are of no use to this run."""
        self.settle()
        for file in self._files():
            if _step_of(file) > after or int(file.suffix[1:]) >= jax.process_count():
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or never made
            self.folder.rmdir()

    def _files(self, writer: int | None = None) -> list[pathlib.Path]:
        """Whole files, of one process or of all, the oldest first."""
        pattern = re.compile(r"\d{9,}\." + (r"\d+" if writer is None else str(writer)))
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(file for file in found if pattern.fullmatch(file.name))

    # --------------------------------------------------------------------------------------- reading

    def restore(
        self, newer_than: int, check: Callable[[dict[str, Any]], None], fits: Callable[[int], bool]
    ) -> TrainState | None:
        """The newest state that the processes have between them, if it is newer and `fits` says yes to its step.

        `check` receives the meta and raises ConfigError for a copy of another run. What is damaged or does not fit
        is left alone, and this is said.
        """
        mine: dict[int, list[int]] = {}
        for file in self._files():
            mine.setdefault(_step_of(file), []).append(int(file.suffix[1:]))
        present = gather({str(step): writers for step, writers in mine.items()})
        steps = sorted({int(step) for found in present for step in found}, reverse=True)
        for step in steps:
            if step > newer_than and fits(step):
                state = self._read(step, [found.get(str(step), []) for found in present], check)
                if state is not None:
                    return state
        return None

    def _read(
        self, step: int, present: list[list[int]], check: Callable[[dict[str, Any]], None]
    ) -> TrainState | None:
        """The state of a step; `present` are the writers whose files each process has."""
        reader = {
            writer: writer if writer < len(present) and writer in present[writer] else process
            for process in reversed(range(len(present)))
            for writer in present[process]
        }
        pieces: Pieces = {}
        metas: dict[int, dict[str, Any]] = {}
        for writer in (writer for writer, process in reader.items() if process == self._me):
            found = self._open(self.folder / f"{step:09d}.{writer}")
            if found is not None:
                metas[writer] = found[0]
                pieces |= found[1]
        whole = gather({str(writer): meta for writer, meta in metas.items()})
        good = {int(writer): meta for found in whole for writer, meta in found.items()}
        if not self._layout.covered(set(good)):
            say(f"the copies of step {step} are not whole: those of processes {sorted(good)} can be read")
            return None
        try:
            check(next(iter(good.values())))
        except ConfigError as error:
            say(f"the copies of step {step} are left alone: {error}")
            return None
        self._exchange(pieces, {writer: reader[writer] for writer in good})
        return self._assemble(pieces)

    def _open(self, path: pathlib.Path) -> tuple[dict[str, Any], Pieces] | None:
        """(meta, pieces) of a file; None, and a line, where it is damaged or of another layout."""
        try:
            data = path.read_bytes()
            end = 40 + int.from_bytes(data[32:40], "little")
            if hashlib.sha256(memoryview(data)[32:]).digest() != data[:32]:
                raise ValueError("it differs from its checksum")
            head = json.loads(data[40:end])
            if head["layout"] != self._layout.key:
                raise ValueError("it is of other devices, another mesh or another network")
            pieces, leaves = {}, jax.tree.leaves(self._like)
            for number, bounds in head["pieces"]:
                piece = (number, tuple((a, b) for a, b in bounds))
                shape, dtype = [b - a for a, b in piece[1]], leaves[number].dtype
                pieces[piece] = np.frombuffer(data, dtype, math.prod(shape), end).reshape(shape)
                end += pieces[piece].nbytes
        except (OSError, ValueError, KeyError) as error:
            _tell(f"{path} is left alone: {error}")
            return None
        return head["meta"], pieces

    def _exchange(self, pieces: Pieces, reader: dict[int, int]) -> None:
        """Give each process the pieces of its devices that another one has read. Bytes: sums would lose a -0."""
        leaves = jax.tree.leaves(self._like)
        for piece, holders in self._layout.holders.items():
            have = sorted({reader[writer] for writer in self._layout.writers[piece] if writer in reader})
            if set(holders) <= set(have):
                continue
            shape, dtype = [b - a for a, b in piece[1]], leaves[piece[0]].dtype
            mine = np.ascontiguousarray(pieces.get(piece, np.zeros(shape, dtype)))
            given = multihost_utils.broadcast_one_to_all(
                mine.reshape(-1).view(np.uint8), is_source=self._me == have[0]
            )
            if self._me in holders:
                pieces[piece] = np.array(given).view(dtype).reshape(shape)

    def _assemble(self, pieces: Pieces) -> TrainState:
        def array(number: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                return pieces[number, _bounds(index or (), leaf.shape)]

            assert leaf.sharding is not None
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

        leaves, structure = jax.tree.flatten(self._like)
        return jax.tree.unflatten(structure, [array(*numbered) for numbered in enumerate(leaves)])


def _step_of(file: pathlib.Path) -> int:
    return int(file.stem)


def _tell(message: str) -> None:
    """One line on stderr, from the process that has something to say."""
    print(f"process {jax.process_index()}: {message}", file=sys.stderr, flush=True)


def _roomy(size: int) -> pathlib.Path:
    """A folder in memory, if it has room for `size` bytes; else the system's temporary one."""
    memory = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2 * size
    return MEMORY if memory else pathlib.Path(tempfile.gettempdir())


def _name_of(workdir: pathlib.Path) -> str:
    """A name for the run, drawn once: a new run in a folder of the same name has nothing to do with its copies."""

    def name() -> str:
        file = workdir / "run_id"
        known = file.read_text() if file.exists() else ""
        if not re.fullmatch(r"[0-9a-f]{16}", known):
            known = secrets.token_hex(8)
            write_whole(file, known)
        return known

    return on_lead(name)


class _Shift:
    """Gives each process's devices what those of the one a stride before hold; `came_from` says which it was."""

    def __init__(self, mesh: jax.sharding.Mesh, stride: int) -> None:
        devices, count = list(mesh.devices.flat), jax.process_count()
        of = [[d for d in devices if d.process_index == process] for process in range(count)]
        pairs = [pair for p in range(count) for pair in zip(of[p], of[(p + stride) % count], strict=True)]
        self.came_from = {target: source for source, target in pairs}
        order = [(devices.index(source), devices.index(target)) for source, target in pairs]

        @functools.cache
        def program(spec: jax.sharding.PartitionSpec) -> Callable[[jax.Array], jax.Array]:
            def move(block: jax.Array) -> jax.Array:
                return jax.lax.ppermute(block, mesh.axis_names, order)

            options: dict[str, Any] = {"in_specs": spec, "out_specs": spec, "check_vma": False}
            return jax.jit(jax.shard_map(move, mesh=mesh, **options))

        self.program = program
