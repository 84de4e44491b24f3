"""The benchmarks on tiny networks: the peer computes the same, results have their fields, errors are refused."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
TINY = ["--model", "DiT-S/2", "--depth", "2", "--hidden-size", "32", "--num-heads", "2", "--latent-size", "8",
        "--batch-size", "2", "--rounds", "2"]  # fmt: skip


def run(script, *options, out=None, code=""):
    """A script of benchmarks/ on one device; with `code`, it and the processes that it starts run that first."""
    folders = (str(FOLDER), str(FOLDER.parent))
    with tempfile.TemporaryDirectory() as first:
        pathlib.Path(first, "sitecustomize.py").write_text(code)
        environment = {
            **os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join((first, *folders)),
            "JAX_COMPILATION_CACHE_DIR": str(FOLDER.parent / ".cache" / "jax"),
        }  # fmt: skip
        command = [sys.executable, str(FOLDER / script), *options, *(["--out", str(out)] if out else [])]
        return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "more", "peers"),
    [
        ("train_step.py", ["--peer-compile", "none"], {"torch"}),
        ("sample.py", ["--steps", "4"], {"torch", "torch-compiled"}),
    ],
)
def test_a_benchmark_checks_times_and_writes(script, more, peers, tmp_path):
    if "torch-compiled" in peers and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler, g++, for torch.compile")
    done = run(script, *TINY, *more, "--peer", "torch", out=tmp_path / "result.json")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["benchmark"] == script
    assert {"device", "versions", "xla_flags"} <= result["environment"].keys()
    assert result["options"]["hidden_size"] == 32
    found = result["results"]
    assert found.keys() == {"jax", *peers} == result["sides"].keys()
    assert found["jax"]["images_per_s"] > 0 and all(found[peer]["time_ratio"] > 0 for peer in peers)
    fastest = min(peers, key=lambda peer: found[peer]["median_s"])
    assert result["peer"] == {"fastest_peer": fastest, "time_ratio": found[fastest]["time_ratio"]}
    assert result["sides"]["jax"]["unrolled"] is False  # layers of this width are not
    assert all(0 <= error < 1e-3 for error in result["correctness"].values())
    assert any(name.startswith("peer") for name in result["correctness"])


def test_bare_products_are_timed_beside_the_peers(tmp_path):
    done = run("products.py", *TINY, "--peer", "torch", out=tmp_path / "result.json")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    kinds = {"forward", "gradient_of_inputs", "gradient_of_weights"}
    assert result["results"].keys() == kinds == result["correctness"].keys()
    for found in result["results"].values():
        assert found["jax"]["tflops"] > 0 and found["torch"]["time_ratio"] > 0


@pytest.mark.slow
def test_a_network_that_computes_something_else_is_not_timed(tmp_path):
    wrong = "import dit_jax.models.norms as b; b.EPSILON = 1.0; import harness\n"
    wrong += "import torch_dit"  # the peer keeps the right epsilon
    done = run("sample.py", *TINY, "--steps", "2", "--peer", "torch", "--only", "peer", out=tmp_path / "r.json",
               code=wrong)  # fmt: skip
    assert done.returncode != 0
    assert "peer_latents: relative error" in done.stderr and "not timed" in done.stderr
    assert not (tmp_path / "r.json").exists()


@pytest.mark.slow
def test_a_training_step_that_computes_something_else_is_not_timed(tmp_path):
    wrong = (
        "import dit_jax.models.norms as b, harness; right, plain = b.EPSILON, harness.plain\n"
        "def plain_with_the_right_epsilon(config):\n    b.EPSILON = right\n    return plain(config)\n"
        "b.EPSILON, harness.plain = 1.0, plain_with_the_right_epsilon"
    )
    done = run("train_step.py", *TINY, out=tmp_path / "r.json", code=wrong)
    assert done.returncode != 0
    assert "relative error" in done.stderr and "not timed" in done.stderr
    assert not (tmp_path / "r.json").exists()


@pytest.mark.slow
def test_start_up_is_timed_without_and_with_kept_programs(tmp_path):
    done = run("compile.py", *TINY, "--rounds", "1", "--steps", "2", out=tmp_path / "result.json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "result.json").read_text())["results"]
    for name in ("train", "sample"):
        start = found[name]
        assert start["warm_to_cold"] == pytest.approx(start["warm_s"] / start["cold_s"])
        assert min(start["cold_s"], start["warm_s"], found["imports_s"]) > 0


SMALL_VAE = ["--channels", "8", "16", "--layers", "1", "--image-size", "16", "--rounds", "2"]


@pytest.mark.slow
def test_the_autoencoder_is_compared_with_diffusers_and_timed(tmp_path):
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[interop]'")
    options = ("--peer-compile", "none")
    done = run("vae.py", *SMALL_VAE, *options, out=tmp_path / "result.json")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["correctness"].keys() == {"encode", "decode"}
    assert all(0 <= error < 1e-3 for error in result["correctness"].values())
    for way in ("encode", "decode"):
        assert result["results"][way].keys() == {"jax", "diffusers", "diffusers-channels-last"}
        assert result["peer"][way]["time_ratio"] > 0


@pytest.mark.slow
def test_an_autoencoder_that_computes_something_else_is_not_timed(tmp_path):
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[interop]'")
    wrong = (
        "import dit_jax.interop.diffusers as d, jax; load = d.load_autoencoder_kl\n"
        "def scaled(folder):\n    model, params = load(folder)\n"
        "    return model, jax.tree.map(lambda x: 1.01 * x, params)\n"
        "d.load_autoencoder_kl = scaled"
    )
    done = run("vae.py", *SMALL_VAE, "--only", "jax", out=tmp_path / "r.json", code=wrong)
    assert done.returncode != 0
    assert "encode: relative error" in done.stderr and "not timed" in done.stderr
    assert not (tmp_path / "r.json").exists()


@pytest.mark.slow
def test_growth_has_a_figure_for_every_point(tmp_path):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install libtpu (Linux, x86-64)")
    points = ["--depths", "1", "--devices", "2", "--topologies", "v5e:2x2", "--images-per-chip", "1"]
    done = run("scaling.py", *TINY, *points, out=tmp_path / "result.json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "result.json").read_text())["results"]
    for how in ("scan", "unrolled"):
        assert found[how]["1"]["compile_s"] > 0
        assert found[how]["1"]["host_mb"] >= found[how]["1"]["host_mb_before"] > 0
    assert found["devices"]["2"]["median_s"] > 0
    chips = found["topology"]["v5e:2x2"]
    assert chips["chips"] == 4 and chips["total_mb"] > chips["state_mb"] > 0


def test_lean_machines_can_run_them():
    absent = ("tyro", "grain", "tensorflow_datasets", "pydantic", "diffusers", "array_record", "PIL", "sklearn",
              "tensorboardX", "safetensors", "matplotlib")  # fmt: skip
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))"
    for script in ("train_step.py", "sample.py"):
        done = run(script, "--help", code=code)
        assert done.returncode == 0, done.stderr[-2000:]


def test_the_peer_is_our_network():
    import argparse

    import harness
    import torch
    import torch_peer

    from dit_jax.models.create import build_model

    args = argparse.Namespace(
        model="DiT-S/2", depth=2, hidden_size=48, num_heads=4, latent_size=8, dtype="float32", attention="einsum",
        norm_kernel="xla", unroll=False, batch_size=3,
    )  # fmt: skip
    config = harness.make_config(args)
    model, rng = build_model(config), np.random.default_rng(0)
    x = rng.standard_normal((3, 8, 8, 4), np.float32)
    t, y = np.array([0, 500, 999], np.int32), np.array([0, 7, 1000], np.int32)
    params = harness.random_params(jax.jit(model.init)(jax.random.key(0), x, t, y)["params"])
    ours = jax.jit(model.apply)({"params": params}, x, t, y)
    network = torch_peer.torch_network(config, params)
    with torch.no_grad():
        theirs = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), *map(torch.from_numpy, (t, y)))
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(ours).max()) > 0.1  # not two networks of zeros


def test_ratios_are_medians_over_rounds():
    import harness

    times = {"jax": [1.0, 3.0, 1.0], "torch": [2.0, 3.0, 4.0]}
    found = harness.summary(times, images=8)
    assert found["jax"]["images_per_s"] == 8.0
    assert found["torch"]["time_ratio"] == 0.5
    assert found["torch"]["time_ratio_of_fastest"] == 0.5


def test_an_error_above_the_tolerance_ends_the_script():
    import harness

    assert harness.check("output", 1e-4, 1e-3) == {"output": 1e-4}
    for error in (2e-3, float("nan")):
        with pytest.raises(SystemExit, match="output: relative error"):
            harness.check("output", error, 1e-3)


@pytest.mark.parametrize("master", [False, True])
def test_the_peers_bfloat16_step_is_its_float32_step_but_for_rounding(master):
    import torch
    import torch_peer

    from dit_jax.config import ComputeConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig

    def step(dtype, master):
        model = ModelConfig(
            name="DiT-S/2", depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=(8, 8),
            num_classes=4,
        )  # fmt: skip
        config = Config(
            model=model, compute=ComputeConfig(dtype=dtype), data=DataConfig(),
            optim=OptimConfig(learning_rate=1e-3, ema_decay=0.5), train=TrainConfig(batch_size=4),
        )  # fmt: skip
        torch.manual_seed(0)
        one = torch_peer.TrainStep(torch_peer.torch_network(config), "torch", config, "none", 1.0, master)
        before = [w.detach().clone() for w in one.weights]
        loss = one(torch.randn(4, 8, 8, 8).abs().half(), torch.arange(4))
        return one, before, loss.item()

    (plain, before, plain_loss), (rounded, _, loss) = step("float32", False), step("bfloat16", master)
    assert loss == pytest.approx(plain_loss, rel=0.02)
    assert all(w.dtype == torch.float32 for w in rounded.weights)
    moved = [(a.detach() - b).flatten() for a, b in zip(plain.weights, before, strict=True)]
    also = [(a.detach() - b).flatten() for a, b in zip(rounded.weights, before, strict=True)]
    assert torch.cosine_similarity(torch.cat(moved), torch.cat(also), dim=0) > 0.9  # Adam's first: signs
    for average, weight, old in zip(rounded.averages, rounded.weights, before, strict=True):
        torch.testing.assert_close(average, old.lerp(weight.detach(), 0.5), rtol=1e-5, atol=1e-6)
        assert average.dtype == torch.float32
    if master:
        assert all(p.dtype == torch.bfloat16 for p in rounded.trained)
        assert all(
            torch.equal(p, w.bfloat16()) for p, w in zip(rounded.trained, rounded.weights, strict=True)
        )
