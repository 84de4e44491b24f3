"""Where compiled programs are kept."""

import os
import pathlib
import subprocess
import sys

import jax
from jax.experimental.compilation_cache import compilation_cache

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


def test_a_program_that_another_process_is_still_writing_is_compiled_anew(tmp_path):
    """Or that a killed one left cut short; under the tests' rule that a warning is an error."""
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in zip(options, (str(tmp_path), 0), strict=True):
            jax.config.update(name, value)
        for damage in (False, True):
            compilation_cache.reset_cache()
            for file in files(tmp_path) if damage else ():
                file.write_bytes(file.read_bytes()[:100])
            assert jax.jit(lambda x: x + 1)(1.0) == 2
            assert files(tmp_path)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
