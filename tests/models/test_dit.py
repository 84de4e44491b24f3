"""The network: shapes, published numbers, initialisation, and what must not change the result."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import DiT
from dit_jax.config import ConfigError
from dit_jax.interop.official import params_from_state_dict
from dit_jax.models.attention import resolve_attention
from dit_jax.models.embeddings import patchify, sincos_positions, unpatchify
from dit_jax.models.norms import normalize

CONDITIONINGS = ["in_context", "cross_attention", "adaln", "adaln_zero"]
TINY = dict(
    input_size=(8, 12), patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=4, num_classes=5
)


def batch(n=3, size=(8, 12), channels=4, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(n, *size, channels)), jnp.float32)
    return x, jnp.asarray(rng.integers(0, 1000, n), jnp.int32), jnp.asarray(rng.integers(0, 5, n), jnp.int32)


def random_params(model, seed=0):
    """Parameters away from the zero initialisation, so that every path shows in the output."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *batch())["params"]
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(size=s.shape) * 0.2, jnp.float32) for s in leaves]
    )


def golden(data_dir, name):
    data = np.load(data_dir / f"official_dit_{name}_sigma.npz")
    settings = {k.removeprefix("config/"): data[k].item() for k in data.files if k.startswith("config/")}
    state = {k.removeprefix("params/"): data[k] for k in data.files if k.startswith("params/")}
    model = DiT(**settings)
    return data, model, params_from_state_dict(state, model)


@pytest.mark.usefixtures("default_precision")
@pytest.mark.parametrize("name", ["learned", "fixed"])
def test_output_is_the_published_implementations(data_dir, name):
    data, model, params = golden(data_dir, name)
    x = data["x"].transpose(0, 2, 3, 1)
    out = model.apply({"params": params}, x, jnp.asarray(data["t"]), jnp.asarray(data["y"]))
    np.testing.assert_allclose(out, data["model/out"].transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_unrolling_and_recomputation_change_neither_output_nor_gradient(conditioning):
    x, t, y = batch()
    plain = DiT(**TINY, conditioning=conditioning)
    params = random_params(plain)

    def value_and_grad(model):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, x, t, y)))))(
            params
        )

    expected = value_and_grad(plain)
    for options in ({"unroll": True}, {"remat": "full"}, {"remat": "dots_attention", "unroll": True}):
        found = value_and_grad(DiT(**TINY, conditioning=conditioning).computed(**options))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, expected)


VARIANTS = {
    "adaln_zero": ("adaln_zero", {}),
    "adaln, tokens last": ("adaln", {"attention": "tokens_last"}),
    "in_context, scan": ("in_context", {"remat": "full"}),
    "cross_attention": ("cross_attention", {}),
    "fp8": ("adaln_zero", {"quantization": "fp8"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_of_a_bfloat16_network_is_rounded_to_bfloat16(variant):
    """They are still to be added up over devices and microbatches."""
    conditioning, options = VARIANTS[variant]
    network = DiT(**TINY, conditioning=conditioning)
    model = network.computed(**options, dtype=jnp.bfloat16)
    params, (x, t, y) = random_params(network), batch()
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, x, t, y)))))(params)

    def check(path, grad):
        rounded = np.asarray(grad.astype(jnp.bfloat16).astype(jnp.float32))
        kept = np.mean(np.asarray(grad) != rounded)
        assert kept > 0.2, f"{jax.tree_util.keystr(path)}: {kept:.0%} of its gradient has more than 8 bits"

    used = {
        k: v for k, v in grads.items() if k != "y_embed"
    }  # most of its rows are of labels not in the batch
    jax.tree_util.tree_map_with_path(check, used)


def test_the_output_of_a_bfloat16_network_is_not_rounded_to_bfloat16():
    """Guidance takes the difference of two that are nearly the same."""
    model, (x, t, y) = DiT(**TINY).computed(dtype=jnp.bfloat16), batch()
    params = random_params(DiT(**TINY))
    out = model.apply({"params": params}, x, t, y)
    assert np.mean(np.asarray(out) != np.asarray(out.astype(jnp.bfloat16), np.float32)) > 0.9


@pytest.mark.usefixtures("default_precision")
def test_what_is_float32_on_every_device_says_so():
    """At jax's default precision an accelerator multiplies fewer bits."""
    model, inputs = DiT(**TINY), batch()
    params = random_params(model)
    text = jax.jit(model.apply).lower({"params": params}, *inputs).as_text()
    stated = [line for line in text.splitlines() if "dot_general" in line and "HIGHEST" in line]
    assert len(stated) == 3
    assert sum("DEFAULT" in line for line in text.splitlines() if "dot_general" in line) >= 8


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_timestep_and_label_reach_every_conditioning(conditioning):
    model = DiT(**TINY, conditioning=conditioning)
    params, (x, t, y) = random_params(model), batch()
    out = model.apply({"params": params}, x, t, y)
    assert out.shape == (3, 8, 12, 8) and out.dtype == jnp.float32
    assert float(jnp.abs(out - model.apply({"params": params}, x, t + 300, y)).max()) > 1e-3
    assert float(jnp.abs(out - model.apply({"params": params}, x, t, (y + 1) % 5)).max()) > 1e-3


def test_unconditional_model_takes_no_label():
    model = DiT(**TINY | {"num_classes": 0}, learn_sigma=False)
    x, t, _ = batch()
    params = model.init(jax.random.key(0), x, t)["params"]
    assert "y_embed" not in params
    assert model.apply({"params": params}, x, t).shape == x.shape


def test_initialisation_is_the_papers():
    model = DiT(**TINY | {"hidden_size": 128}, conditioning="adaln_zero")
    params = model.init(jax.random.key(1), *batch())["params"]

    def check_std(kernel, expected):
        assert float(jnp.std(kernel)) == pytest.approx(expected, rel=0.05)

    d, flat = 128, 2 * 2 * 4
    for layer in range(2):  # Xavier on the fused matrix: variance 2 / (fan_in + fan_out)
        check_std(params["blocks"]["attn"]["qkv"]["kernel"][layer], math.sqrt(2 / (d + 3 * d)))
        check_std(params["blocks"]["attn"]["proj"]["kernel"][layer], math.sqrt(2 / (2 * d)))
        check_std(params["blocks"]["mlp"]["fc1"]["kernel"][layer], math.sqrt(2 / (5 * d)))
    check_std(params["patch_embed"]["kernel"], math.sqrt(2 / (flat + d)))
    check_std(params["t_embed"]["fc1"]["kernel"], 0.02)
    check_std(params["t_embed"]["fc2"]["kernel"], 0.02)
    check_std(params["y_embed"]["embedding"], 0.02)
    assert params["y_embed"]["embedding"].shape == (6, 128)  # 5 classes and the null class
    for name in ("adaln", "final_adaln", "final_linear"):
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(params[name])), name
    biases = [
        leaf for path, leaf in jax.tree.leaves_with_path(params) if "bias" in jax.tree_util.keystr(path)
    ]
    assert len(biases) > 5 and not any(np.any(b) for b in biases)
    blocks = params["blocks"]["attn"]["qkv"]["kernel"]
    assert float(jnp.abs(blocks[0] - blocks[1]).max()) > 0.01  # layers differ


def test_all_gates_at_zero_make_every_block_the_identity():
    model = DiT(**TINY)
    x, t, y = batch()
    params = model.init(jax.random.key(0), x, t, y)["params"]
    one_layer = DiT(**TINY | {"depth": 1})
    cut = dict(params, blocks=jax.tree.map(lambda a: a[:1], params["blocks"]))
    cut["adaln"] = {"kernel": params["adaln"]["kernel"][:, :1], "bias": params["adaln"]["bias"][:1]}
    readout = jnp.asarray(np.random.default_rng(0).normal(size=(32, 32)), jnp.float32)
    for tree in (params, cut):
        tree["final_linear"] = {"kernel": readout, "bias": jnp.zeros(32)}
    expected = one_layer.apply({"params": cut}, x, t, y)
    assert float(jnp.abs(expected).max()) > 0.1
    np.testing.assert_array_equal(model.apply({"params": params}, x, t, y), expected)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_bfloat16_compute_stays_near_float32_with_float32_parameters(conditioning):
    x, t, y = batch()
    exact = DiT(**TINY, conditioning=conditioning)
    params = random_params(exact)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    expected = exact.apply({"params": params}, x, t, y)
    out = (
        DiT(**TINY, conditioning=conditioning).computed(dtype=jnp.bfloat16).apply({"params": params}, x, t, y)
    )
    assert out.dtype == jnp.float32
    error = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
    assert 1e-5 < error < 0.03  # bfloat16 was used, and harms little


@pytest.mark.parametrize("kernel", ["xla", "tokens_last", "tokens_last_by_head"])
def test_attention_kernels_agree(kernel):
    x, t, y = batch()
    params = random_params(DiT(**TINY))
    expected = DiT(**TINY).computed(attention="einsum").apply({"params": params}, x, t, y)
    found = DiT(**TINY).computed(attention=kernel).apply({"params": params}, x, t, y)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "kind", "dtype", "tokens", "head_dim", "kernel"),
    [
        ("cpu", "cpu", "bfloat16", 1024, 72, "einsum"),
        ("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", 256, 72, "cudnn"),
        ("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", 256, 36, "einsum"),
        ("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", 256, 144, "einsum"),
        ("gpu", "NVIDIA H100 80GB HBM3", "float32", 256, 72, "einsum"),
        ("tpu", "TPU v5 lite", "bfloat16", 256, 72, "tokens_last"),
        ("tpu", "TPU v5 lite", "bfloat16", 1024, 72, "tokens_last_by_head"),
        ("tpu", "TPU v5", "bfloat16", 1024, 72, "tokens_last"),
        ("tpu", "TPU v5", "bfloat16", 4096, 72, "tokens_last_by_head"),
        ("tpu", "TPU v4", "bfloat16", 1024, 72, "tokens_last"),
    ],
)
def test_auto_attention_is_what_suits_the_device(platform, kind, dtype, tokens, head_dim, kernel):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    assert resolve_attention("auto", dtype, tokens, head_dim, device) == kernel
    assert resolve_attention("xla", dtype, tokens, head_dim, device) == "xla"


@pytest.mark.parametrize("remat", ["none", "dots_attention"])
def test_gradients_of_the_tpu_layout_are_those_of_the_plain_one(remat):
    x, t, y = batch()
    params = random_params(DiT(**TINY))

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, x, t, y)))))(params)

    expected = gradient(DiT(**TINY).computed(attention="einsum"))
    found = gradient(DiT(**TINY).computed(attention="tokens_last", remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, expected)


def test_one_head_at_a_time_changes_neither_output_nor_gradient():
    x, t, y = batch()
    params = random_params(DiT(**TINY))

    def value_and_grad(attention):
        model = DiT(**TINY).computed(attention=attention, remat="dots_attention")
        loss = lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, x, t, y)))  # noqa: E731
        return str(jax.make_jaxpr(loss)(params)).count("scan["), jax.jit(jax.value_and_grad(loss))(params)

    scans, expected = value_and_grad("tokens_last")
    more_scans, found = value_and_grad("tokens_last_by_head")
    assert more_scans > scans
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, expected)


def test_the_norm_of_bfloat16_is_that_of_the_same_numbers_in_float64():
    x = jnp.asarray(np.random.default_rng(4).normal(5.0, 1.0, (3, 7, 256)), jnp.bfloat16)
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normalize(x), exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(normalize(jnp.full((2, 64), 3.0, jnp.bfloat16)), 0)


def test_patches_keep_rows_columns_and_channels_in_order():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[1, 4].reshape(2, 2, 3), x[1, 2:4, 2:4])  # row 1, column 1 of 2x3
    np.testing.assert_array_equal(unpatchify(tokens, 2, (4, 6)), x)


def test_positions_encode_column_first_then_row():
    table = sincos_positions(3, 5, 16).reshape(3, 5, 16)
    np.testing.assert_array_equal(table[0, :, :8], table[2, :, :8])  # the first half ignores the row
    np.testing.assert_array_equal(table[:, 0, 8:], table[:, 4, 8:])  # the second ignores the column
    assert table[1, 0, 8] == pytest.approx(math.sin(1.0)) and table[1, 0, 12] == pytest.approx(math.cos(1.0))


def test_a_label_outside_the_table_is_not_silently_another_class():
    model = DiT(**TINY)
    x, t, _ = batch()
    params = random_params(model)
    assert np.all(np.isfinite(model.apply({"params": params}, x, t, jnp.full(3, 5))))  # the null class
    for outside in (6, -1):
        assert np.all(np.isnan(model.apply({"params": params}, x, t, jnp.full(3, outside))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 5}, r"input_size \(8, 12\) is not divisible by patch_size 5"),
        ({"num_heads": 5}, "hidden_size 32 is not divisible by num_heads 5"),
        ({"conditioning": "film"}, "conditioning is 'film'"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DiT(**TINY | options).init(jax.random.key(0), *batch())


@pytest.mark.parametrize("option", ["remat", "quantization", "norm_kernel"])
def test_a_way_to_compute_that_there_is_not_is_refused(option):
    with pytest.raises(ConfigError, match=f"--compute.{option.replace('_', '-')} is 'some'; expected "):
        DiT(**TINY).computed(**{option: "some"})


def test_wrong_inputs_are_refused():
    model = DiT(**TINY)
    x, t, y = batch()
    with pytest.raises(ValueError, match=r"x has shape \(3, 12, 8, 4\); expected \(batch, 8, 12, 4\)"):
        model.init(jax.random.key(0), x.transpose(0, 2, 1, 3), t, y)
    with pytest.raises(ValueError, match="y is missing"):
        model.init(jax.random.key(0), x, t)


@pytest.mark.parametrize(("remat", "forward_passes"), [("none", 1), ("dots_attention", 1), ("full", 2)])
def test_cudnn_attention_is_computed_once_where_remat_keeps_it(monkeypatch, remat, forward_passes):
    cudnn = pytest.importorskip(
        "jax._src.cudnn.fused_attention_stablehlo", reason="needs JAX's cuDNN attention"
    )
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)  # traced only: no GPU is needed
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    model = DiT(**TINY | {"hidden_size": 128, "num_heads": 2}).computed(dtype=jnp.bfloat16, remat=remat)
    x, t, y = batch()
    params = jax.eval_shape(model.computed(remat="none").init, jax.random.key(0), x, t, y)["params"]
    fused = model.computed(attention="cudnn")
    gradient = jax.grad(lambda p: fused.apply({"params": p}, x, t, y).sum())
    program = str(jax.make_jaxpr(gradient)(params))
    assert program.count("dot_product_attention_fwd_wrapper[") == forward_passes
    assert program.count("dot_product_attention_bwd_wrapper[") == 1
