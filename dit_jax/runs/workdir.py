"""The folder of a run: what it says of its config and dataset, and whether another run may go on in it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from dit_jax import leases, paths, signals
from dit_jax.config import ComputeConfig, Config, ConfigError, from_json, to_json
from dit_jax.data.metadata import LatentMetadata
from dit_jax.files import write_whole
from dit_jax.processes import on_lead
from dit_jax.runs.checkpoint import CheckpointError

EXIT_LOST = 1  # of a process whose run another one has taken over

# Options that may change when a run goes on; any other makes it another run.
HARMLESS = {
    "model": {"name"},  # sizes count, not the name they came by
    "compute": {field.name for field in dataclasses.fields(ComputeConfig)},
    # Another VAE is another dataset, which is refused; of a mixture the weights count, wherever its parts lie.
    "data": {"dir", "source", "cache", "local_cache", "local_cache_gb", "workers", "vae"},
    "mesh": {"preset", "data", "fsdp", "tensor"},
    "train": {
        "workdir", "microbatch", "steps", "log_every", "checkpoint_every", "keep", "milestone_every",
        "snapshot_every", "bad_steps", "stall_minutes", "profile_steps", "max_rollbacks", "init_from",
        "sample_every", "sample_count", "sample_steps", "sample_cfg_scale", "evaluate_every", "evaluate_count",
        "evaluate_reference", "local_checkpoint_every", "local_checkpoint_dir",
    },
}  # fmt: skip


def check_same_run(config: Config, saved: Config, where: str | os.PathLike[str]) -> None:
    """Raises ConfigError, naming the first option that makes `config` another run than the saved one."""
    for group, options in dataclasses.asdict(config).items():
        before = dataclasses.asdict(saved)[group]
        if options.get("kind") != before.get("kind"):  # the other options are not the same either
            options = {"kind": options["kind"]}
        for name, value in options.items():
            harmless = name in HARMLESS.get(group, ())
            if name == "steps" and config.optim.schedule != "constant":
                harmless = False  # the learning rate's decay ends there
            if _said(group, name, value) != _said(group, name, before[name]) and not harmless:
                option = f"--{group}.{name}".replace("_", "-")
                raise ConfigError(
                    f"{option} is {value!r}; the run in {where} has {before[name]!r}: "
                    f"go on with the same value, or name another --train.workdir"
                )


def _said(group: str, name: str, value: Any) -> Any:
    """What counts of an option's value."""
    return [weight for _, weight in value] if (group, name) == ("data", "mixture") else value


def read_metadata(option: str, workdir: pathlib.Path) -> LatentMetadata:
    """The metadata of the dataset of the run in a folder that `option` names; raises ConfigError."""
    path = workdir / "dataset.json"
    if not path.is_file():
        raise ConfigError(
            f"{option} is {workdir}, which has no {path.name}; expected the folder of a trained run"
        )
    try:
        text = paths.read_bytes(path).decode()
    except (OSError, ValueError) as error:  # bytes that are no text
        raise ConfigError(f"{path} cannot be read ({error}); expected it as training wrote it") from None
    return LatentMetadata.from_json(text, str(path))


def meta_of(config: Config, fingerprint: str) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {"config": json.loads(to_json(config)), "dataset": fingerprint}


def check_meta(
    config: Config, fingerprint: str, directory: pathlib.Path, parts: Sequence[str] = ()
) -> Callable[[dict[str, Any]], None]:
    """The check for `Checkpoints.restore`: same run, same dataset; parts: fingerprints of a mixture's."""

    def check(meta: dict[str, Any]) -> None:
        check_same_run(config, from_json(json.dumps(meta["config"])), directory)
        mixture = zip(config.data.mixture, meta.get("parts", ()), parts, strict=False)
        named = [("--data.dir", meta["dataset"], fingerprint)]
        named = [(f"--data.mixture {dir}", before, now) for (dir, _), before, now in mixture] or named
        for option, before, now in named:
            if before != now:
                raise CheckpointError(
                    f"the checkpoints in {directory} were trained on another dataset "
                    f"(fingerprint {before[:12]}, {option} has {now[:12]})"
                )

    return check


def dataset_fingerprint(metadata: LatentMetadata) -> str:
    """SHA-256 of a dataset's metadata, which holds a checksum of every shard."""
    return hashlib.sha256(metadata.to_json().encode()).hexdigest()


def check_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Raises ConfigError if the workdir holds a run of another config, or a config.json that cannot be read.

    Checkpoints hold their config too: without a config.json `check_meta` decides.
    """
    if not paths.is_remote(workdir) and os.path.lexists(workdir) and not os.path.isdir(workdir):
        found = f"a link to {os.readlink(workdir)}, no folder" if os.path.islink(workdir) else "no folder"
        raise ConfigError(f"--train.workdir is {os.fspath(workdir)!r}, which is {found}; expected a folder")
    path = workdir / "config.json"
    if paths.is_file(path):
        try:
            saved = from_json(paths.read_bytes(path).decode())
        except ValueError as error:  # ConfigError, or bytes that are no text
            raise ConfigError(
                f"{path} cannot be read ({error}); remove it, the checkpoints hold their config too"
            ) from None
        check_same_run(config, saved, workdir)


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the workdir, by process 0, as long as the block runs: two runs would write over each other's files.

    The system lets go of it when the process ends, however it ends; in a bucket it is taken over half a minute later.
    Raises ConfigError, in all processes, while another run holds it; a file system without locks is left alone.
    """
    taken = ConfigError(
        f"--train.workdir is {str(workdir)!r}, where another run is training; wait until it has ended, or name "
        "another folder"
    )
    with contextlib.ExitStack() as held:

        def lock() -> None:
            if paths.is_remote(workdir):
                try:
                    held.enter_context(
                        leases.leased(workdir / ".lock", lambda said: signals.end(EXIT_LOST, said))
                    )
                except leases.HeldError:
                    raise taken from None
                return
            file = held.enter_context((workdir / ".lock").open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise taken from None

        on_lead(lock)
        yield


def write_description(config: Config, metadata: LatentMetadata, workdir: pathlib.Path) -> None:
    """The resolved config as workdir/config.json and the dataset's metadata as dataset.json, by process 0.

    With them a workdir can be sampled from where the dataset is not.
    """
    if jax.process_index() == 0:
        for name, text in (("config.json", to_json(config)), ("dataset.json", metadata.to_json())):
            write_whole(workdir / name, text)
