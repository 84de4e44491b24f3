"""diffusers' DiTPipeline: the whole of it against ours, in both directions, and what is refused of its files."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dit_jax.config import ConfigError, GaussianConfig
from dit_jax.diffusion.samplers import sample_keys, start_noise
from dit_jax.generation.sampling import SamplingOptions, device_mesh, load_vae, make_latent_sampler
from dit_jax.interop import keymap
from dit_jax.interop.pipeline import read_pipeline, write_pipeline
from dit_jax.interop.weights import Reading
from dit_jax.models.autoencoder_kl import from_latents
from dit_jax.models.create import build_model
from dit_jax.models.norms import normalize
from dit_jax.models.parts import DIFFUSERS_SECOND_NORM, LAYER_NORM, Norm
from dit_jax.runs.convert import metadata_of

# diffusers hands torch tensors to NumPy.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)

LABELS, STEPS, SCALE = [3, 207, 999], 12, 4.0


def read(folder, **said):
    return read_pipeline(str(folder), folder, Reading(**said))


@pytest.fixture(scope="module")
def weights(pipeline_folder):
    return read(pipeline_folder)


# The pipeline draws its start noise itself, by `randn_tensor`: the test puts ours in its place.


def peer_pictures(monkeypatch, peers, pipeline, scheduler, noise):
    """(latents, pictures in [0, 1]) of diffusers' pipeline, guided on all channels, both (N, h, w, C)."""
    torch, _ = peers
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    start = torch.tensor(np.moveaxis(np.asarray(noise), -1, 1))
    module = "diffusers.pipelines.dit.pipeline_dit.randn_tensor"
    seen, decode = [], type(pipeline.vae).decode
    monkeypatch.setattr(module, lambda **_: start)
    monkeypatch.setattr(type(pipeline.vae), "decode", lambda self, z: (seen.append(z), decode(self, z))[1])
    out = pipeline(class_labels=LABELS, guidance_scale=SCALE, num_inference_steps=STEPS, output_type="np")
    monkeypatch.undo()
    return np.moveaxis(seen[0].numpy(), 1, -1) * pipeline.vae.config.scaling_factor, out.images


def our_pictures(weights, sampler, times):
    """(latents, pictures in [0, 1], start noise) of our sampler and autoencoder with the same weights."""
    model = build_model(weights.config)
    options = SamplingOptions(sampler, len(times) - 1, SCALE, grid=tuple(map(float, times)))
    draw = make_latent_sampler(model, weights.config, options, device_mesh(1))
    indices = np.arange(len(LABELS), dtype=np.int32)
    latents = np.asarray(draw(weights.params, 0, indices, {"label": np.array(LABELS, np.int32)}))
    metadata = metadata_of(weights)
    vae, params = load_vae(metadata)
    z = from_latents(jnp.asarray(latents), metadata.scaling_factor, metadata.shift_factor)
    pictures = vae.apply({"params": params}, z, method="decode")
    noise = start_noise(sample_keys(jax.random.key(0), indices), latents.shape[1:])
    return latents, np.clip(np.asarray(pictures) / 2 + 0.5, 0, 1), noise


SCHEDULERS = {"ddim": ("DDIMScheduler", {}), "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2})}


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("direction", ["theirs", "ours"])
def test_same_latents_and_pictures(peers, peer_pipeline, weights, monkeypatch, tmp_path, sampler, direction):
    """theirs: written by diffusers, read by us. ours: written by us, read by diffusers."""
    _, diffusers = peers
    pipeline = peer_pipeline
    if direction == "ours":
        rng = np.random.default_rng(1)
        other = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), weights.params)
        weights = dataclasses.replace(weights, params=other)
        if sampler == "ddim":
            process = GaussianConfig("squaredcos_cap_v2", prediction="v")
            weights = dataclasses.replace(
                weights, config=dataclasses.replace(weights.config, diffusion=process)
            )
        write_pipeline(tmp_path / "ours", weights)
        pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
        assert pipeline.get_label_ids(["other 207", "name 3"]) == [207, 3]
        assert pipeline.scheduler.config.clip_sample is False
    name, options = SCHEDULERS[sampler]
    scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
    scheduler.set_timesteps(STEPS)
    times = [*scheduler.timesteps.tolist(), -1]
    latents, pictures, noise = our_pictures(weights, sampler, times)
    their_latents, their_pictures = peer_pictures(monkeypatch, peers, pipeline, scheduler, noise)
    size = np.abs(their_latents).max()
    np.testing.assert_allclose(latents / size, their_latents / size, atol=1e-4)
    np.testing.assert_allclose(pictures, their_pictures, atol=1 / 255)
    assert pictures.std() > 0.05  # not all black or white


@pytest.fixture
def difference(peers, peer_pipeline, weights):
    """(our network, ...) -> the largest difference of its output from diffusers', relative to the largest output."""
    torch, _ = peers
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((3, 8, 8, 4), np.float32), np.array([0, 500, 999], np.int32)
    y = np.array(LABELS, np.int32)

    def largest(network):
        with torch.no_grad():
            theirs = peer_pipeline.transformer(
                torch.tensor(np.moveaxis(x, -1, 1)), timestep=torch.tensor(t), class_labels=torch.tensor(y)
            ).sample
        expected = np.moveaxis(theirs.numpy(), 1, -1)
        found = jax.jit(lambda p: network.apply({"params": p}, x, t, y))(weights.params)
        return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())

    return largest


def test_the_two_conventions_are_two_networks(weights, difference):
    published = dataclasses.replace(weights.config.model, convention="published")
    network = build_model(weights.config)
    assert difference(network) < 1e-5
    assert difference(network.computed(norm_kernel="pallas")) < 1e-5
    assert difference(build_model(dataclasses.replace(weights.config, model=published))) > 0.01


def test_the_second_norm_is_the_one_that_differs(peer_pipeline, weights, difference, monkeypatch):
    """1e-5 or 1e-6 hardly shows in an output: with 1.0 on both sides it does."""
    network = build_model(weights.config)
    assert network.parts.second_norm is DIFFUSERS_SECOND_NORM
    for block in peer_pipeline.transformer.transformer_blocks:
        assert (block.norm1.norm.eps, block.norm3.eps, peer_pipeline.transformer.norm_out.eps) == (
            1e-6,
            1e-5,
            1e-6,
        )
        monkeypatch.setattr(block.norm3, "eps", 1.0)
    other = Norm(functools.partial(normalize, epsilon=1.0), LAYER_NORM.affine)
    assert difference(network) > 1e-3
    assert difference(network.clone(parts=dataclasses.replace(network.parts, second_norm=other))) < 1e-5


def test_the_second_norms_epsilon_is_the_conventions(weights):
    """Where tokens are nearly constant, epsilon is what the norm divides by."""
    x = 1e-3 * jnp.array([[[1.0, -1.0, 1.0, -1.0]]])
    zero = jnp.zeros((1, 4))
    for norm, epsilon in ((LAYER_NORM, 1e-6), (DIFFUSERS_SECOND_NORM, 1e-5)):
        expected = x / np.sqrt(1e-6 + epsilon)
        for found in (
            norm.normalize(x),
            norm.by_hand(x, zero, zero, jnp.float32),
            norm.fused(x, None, None, zero, zero, jnp.float32)[1],
            norm.affine(name="n").apply({"params": {"scale": zero[0] + 1, "bias": zero[0]}}, x),
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------ files


def same_bits(found, expected):
    found, expected = keymap.flatten(found), keymap.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_round_trip_to_the_bit(peer_pipeline, weights, tmp_path):
    write_pipeline(tmp_path / "again", weights)
    back = read(tmp_path / "again")
    same_bits(back.params, weights.params)
    assert back.config == weights.config and back.label_names == weights.label_names
    tensors = safetensors.numpy.load_file(tmp_path / "again/transformer/diffusion_pytorch_model.safetensors")
    theirs = peer_pipeline.transformer.state_dict()
    assert tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy(), err_msg=name)


def test_fewer_classes_keep_their_null(peers, weights, tmp_path):
    """DiTPipeline guides by class 1000: a network of 4 classes has its null there, and comes back as it was."""
    model = dataclasses.replace(weights.config.model, num_classes=4)
    table = weights.params["y_embed"]["embedding"][:5]
    few = dataclasses.replace(
        weights,
        config=dataclasses.replace(weights.config, model=model),
        params={**weights.params, "y_embed": {"embedding": table}},
        label_names=("a", "b", "c", "d"),
    )
    write_pipeline(tmp_path / "few", few)
    pipeline = peers[1].DiTPipeline.from_pretrained(tmp_path / "few", low_cpu_mem_usage=False)
    embedder = pipeline.transformer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table
    np.testing.assert_array_equal(embedder.weight[1000].detach().numpy(), table[4])
    back = read(tmp_path / "few")
    assert back.config.model.num_classes == 4 and back.label_names == ("a", "b", "c", "d")
    same_bits(back.params, few.params)


def test_older_repositories_have_pickles_and_another_class(peers, peer_pipeline, weights, tmp_path):
    peer_pipeline.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old/transformer/diffusion_pytorch_model.bin").is_file()
    edit(tmp_path / "old/transformer/config.json", _class_name="Transformer2DModel", cross_attention_dim=None)
    edit(tmp_path / "old/model_index.json", id2label={"0": "tench, Tinca tinca", "207": "golden retriever"})
    found = read(tmp_path / "old")
    same_bits(found.params, weights.params)
    assert found.label_names[207] == "golden retriever" and found.label_names[1] == "1"
    assert load_vae(metadata_of(found))[0].config.scaling_factor == 0.7


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


TRANSFORMER, SCHEDULER = "transformer/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            TRANSFORMER,
            {"_class_name": "UNet2DModel"},
            "is of a UNet2DModel; expected DiTTransformer2DModel or",
        ),
        (TRANSFORMER, {"norm_type": "layer_norm"}, "has norm_type 'layer_norm'; expected 'ada_norm_zero'"),
        (TRANSFORMER, {"out_channels": 5}, "has out_channels 5; expected 4 or 8"),
        (TRANSFORMER, {"num_layers": "2"}, "has num_layers '2'; expected a number above 0"),
        (TRANSFORMER, {"sample_size": 7}, r"cannot be used: --model.input-size is \(7, 7\)"),
        (TRANSFORMER, {"num_layers": 3}, r"missing: transformer_blocks\.\d\..*transformer_blocks\.2\."),
        (
            SCHEDULER,
            {"beta_schedule": "scaled_linear"},
            "of beta_schedule 'scaled_linear'; expected linear or",
        ),
        (SCHEDULER, {"beta_end": 0.012}, "has beta_end 0.012; expected 0.02"),
        (SCHEDULER, {"beta_start": "x"}, "has beta_start 'x'; expected 0.0001"),
        (SCHEDULER, {"prediction_type": "flow"}, "has prediction_type 'flow'; expected epsilon or sample"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "has rescale_betas_zero_snr; expected the plain"),
        ("vae/config.json", {"act_fn": "relu"}, "autoencoder cannot be read: .*act_fn is 'relu'"),
    ],
)
def test_another_architecture_is_named(pipeline_folder, tmp_path, file, changes, message):
    folder = shutil.copytree(pipeline_folder, tmp_path / "copy")
    edit(folder / file, **changes)
    with pytest.raises(ConfigError, match=message) as refused:
        read(folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def test_weights_in_several_files_are_those_of_one(pipeline_folder, weights, tmp_path):
    folder = shutil.copytree(pipeline_folder, tmp_path / "copy")
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    file.unlink()
    where = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for part in set(where.values()):
        of_it = {name: tensor for name, tensor in tensors.items() if where[name] == part}
        safetensors.numpy.save_file(of_it, file.with_name(part))
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": where}))
    jax.tree.map(np.testing.assert_array_equal, read(folder).params, weights.params)


def test_damaged_weights_are_named(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder, tmp_path / "copy")
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    copy = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    other = tensors | {copy: tensors[copy] + 1}
    del other["proj_out_2.bias"]
    safetensors.numpy.save_file(other, file)
    with pytest.raises(
        ConfigError, match=r"missing: proj_out_2.bias \(32,\); of other values: .*emb"
    ) as refused:
        read(folder)
    assert f"{copy} is not the copy of {copy.replace('.1.', '.0.', 1)}" in str(refused.value)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="is not a whole safetensors file"):
        read(folder)
    file.unlink()
    with pytest.raises(ConfigError, match=r"transformer has no diffusion_pytorch_model.safetensors"):
        read(folder)
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"model_index.json holds a list; expected an object"):
        read(folder)


def test_what_the_pipeline_cannot_do_is_refused(tiny, weights, tmp_path):
    def refused(message, **parts):
        config = tiny.config(**({"model": {"mlp_ratio": 4.0}} | parts))
        given = dataclasses.replace(weights, config=config)
        with pytest.raises(ConfigError, match=message):
            write_pipeline(tmp_path / "no", given)

    refused("--model.conditioning is adaln; DiTPipeline needs adaln_zero", model={"conditioning": "adaln"})
    refused("--model.mlp-ratio is 2.0; DiTPipeline needs 4.0", model={"mlp_ratio": 2.0})
    refused(
        "--model.class-dropout-prob 0.0; DiTPipeline needs",
        model={"class_dropout_prob": 0.0, "mlp_ratio": 4.0},
    )
    refused("--model.num-classes is 0 ", model={"num_classes": 0, "mlp_ratio": 4.0})
