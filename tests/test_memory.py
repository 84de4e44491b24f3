"""What malloc keeps: page faults of a repeated computation, in processes of their own; limits on memory."""

import os
import subprocess
import sys

import pytest

from dit_jax import memory

COUNT_FAULTS = """
import ctypes, resource, statistics, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: where pages may be huge, few are counted
from dit_jax.memory import keep_freed_memory

print(keep_freed_memory() if sys.argv[1] == "keep" else False)
import jax, jax.numpy as jnp
x = jnp.ones(4096)
f = jax.jit(lambda x: jnp.cos(jnp.outer(x, x)[:, :64].T @ jnp.outer(x, x)).sum())
faults = []
for _ in range(61):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults)))
"""


def run(choice: str, platforms: str) -> tuple[str, int]:
    environment = {**os.environ, "JAX_PLATFORMS": platforms, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", COUNT_FAULTS, choice]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(
    sys.platform != "linux" or "gnu" not in (sys.implementation._multiarch or ""),
    reason="needs glibc's malloc",
)
def test_freed_memory_is_kept_for_the_next_step():
    # The median of the steps: what is kept still grows now and then, when two buffers meet that never met before.
    kept, faults = run("keep", "cpu")
    _, returned = run("leave", "cpu")
    assert kept == "True"
    assert returned > 10_000  # every step gets fresh pages: some 64 MiB of 4 KiB each
    assert faults < returned / 100


def test_malloc_is_left_alone_where_an_accelerator_may_be_in_use(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert not memory.keep_freed_memory()


@pytest.mark.parametrize(
    ("group", "files", "limits"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "5000", "memory.max": "9000"}, [5000, 9000]),
        ("0::/pod/of/the/host", {"memory.max": "7000"}, [7000]),  # inside of a container
        (
            "9:cpu:/a\n4:memory:/a",
            {"memory/a/memory.limit_in_bytes": "300", "memory.max": "1"},
            [300],
        ),
        ("0::/", {}, []),
    ],
)
def test_limits_of_control_groups_are_seen(tmp_path, group, files, limits):
    (tmp_path / "group").write_text(group + "\n")
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert memory._group_limits(tmp_path / "group", tmp_path / "root") == limits
    assert memory._group_limits(tmp_path / "none", tmp_path / "root") == []


def test_memory_is_that_of_the_host_at_most():
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.host_memory() <= host
