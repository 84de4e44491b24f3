"""The sweep: variants that fail are noted, finished ones are not run again, the table has a row for each."""

import json

import gpu_sweep
import pytest


def test_every_variant_has_a_file_and_options_of_its_own():
    variants = [v for stage in gpu_sweep.stages().values() for v in stage]
    assert len({gpu_sweep.result_file(gpu_sweep.HERE, v) for v in variants}) == len(variants)
    assert len({(v.script, v.options, v.flags) for v in variants}) == len(variants)


@pytest.mark.slow
def test_a_failing_variant_is_noted_and_the_others_run(tmp_path, monkeypatch):
    good = gpu_sweep.train("fits", model=("--model", "DiT-S/2"))
    bad = gpu_sweep.train("unknown flag", flags=("--xla_no_such_flag=1",))
    monkeypatch.setattr(gpu_sweep, "stages", lambda: {"train": [bad, good]})
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr("sys.argv", ["gpu_sweep.py", "--out", str(tmp_path), "--smoke"])
    assert gpu_sweep.main() == 0
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert any("unknown flag | failed:" in row and "xla_no_such_flag" in row for row in rows)
    assert any(row.startswith("| train | fits | ") and "failed" not in row for row in rows)

    ran = []
    monkeypatch.setattr(
        gpu_sweep, "run", lambda variant, out, limit: ran.append(variant.name) or {"failed": "-"}
    )
    gpu_sweep.main()
    assert ran == ["unknown flag"]
    assert json.loads(gpu_sweep.result_file(tmp_path, good).read_text())["results"]["jax"]["images_per_s"] > 0


def test_the_reason_is_the_telling_line():
    error = "Traceback\n  File x\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9\nbye\n"
    assert gpu_sweep.why(error).startswith("jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED")
    assert gpu_sweep.why("") == "no output"
