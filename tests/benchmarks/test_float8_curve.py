"""The comparison of loss curves: runs that differ in precision alone, and figures that say by how much."""

import argparse
import dataclasses
import json
import pathlib

import float8_curve
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


def test_runs_differ_in_precision_alone(tmp_path):
    args = argparse.Namespace(
        config=str(ROOT / "configs" / "digits.py"), steps=100, log_every=5, workdir=tmp_path
    )
    configs = {name: float8_curve.run_config(args, name, 0) for name in float8_curve.PRECISIONS}
    assert len({config.train.workdir for config in configs.values()}) == 3
    assert configs["fp8"].compute.quantization == "fp8" and configs["fp8"].compute.dtype == "bfloat16"
    for config in configs.values():
        compute = dataclasses.replace(config.compute, dtype="float32", quantization="none")
        train = dataclasses.replace(config.train, workdir=configs["float32"].train.workdir)
        assert dataclasses.replace(config, compute=compute, train=train) == configs["float32"]
    assert float8_curve.run_config(args, "float32", 2).train.seed == configs["float32"].train.seed + 2


def test_figures_are_of_the_last_tenth_and_relative_to_bfloat16(tmp_path):
    def curve(last):
        (tmp_path / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"step": step, "loss": last if step > 90 else 1.0}) + "\n"
                for step in range(5, 101, 5)
            )
        )
        return float8_curve.losses(tmp_path)

    curves = {"float32": curve(0.5), "bfloat16": curve(0.5), "fp8": curve(0.52)}
    found = float8_curve.summary(curves, 100)["fp8"]
    assert found["first_loss"] == 1.0 and found["final_loss"] == pytest.approx(0.52)
    assert found["final_to_bfloat16"] == pytest.approx(1.04)
    assert found["largest_difference_to_bfloat16"] == pytest.approx(0.04)
    assert np.array_equal(curves["fp8"][0], np.arange(5, 101, 5))


def test_curves_are_drawn(tmp_path):
    curves = {name: (np.arange(3), np.array([1.0, 0.9, 0.8])) for name in float8_curve.PRECISIONS}
    float8_curve.draw(curves, "three", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
