"""Where compiled programs are kept."""

import os
import pathlib
import subprocess
import sys

CODE = """
import jax
from dit_jax.compiler import keep_compiled_programs

keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1.0)
"""


def run(**variables: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | variables
    subprocess.run([sys.executable, "-c", CODE], env=environment, check=True)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_programs_are_kept_in_the_users_cache_or_where_told(tmp_path):
    run(XDG_CACHE_HOME=str(tmp_path / "cache"))
    (folder,) = (tmp_path / "cache" / "dit_jax").iterdir()  # one per kind of processor
    kept = files(folder)
    assert any("jit_" in p.name for p in kept)
    run(XDG_CACHE_HOME=str(tmp_path / "cache"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "elsewhere"))
    assert any("jit_" in p.name for p in files(tmp_path / "elsewhere"))
    assert len(files(folder)) == len(kept)
