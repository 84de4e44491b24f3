"""diffusers' StableDiffusion3Pipeline: all of it against ours, both ways, and what is refused of its files."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dit_jax.config import ConfigError, LoraConfig
from dit_jax.config.text import SD3_FOLDERS
from dit_jax.diffusion.flow import FlowMatching
from dit_jax.diffusion.samplers import sample_keys, start_noise
from dit_jax.generation.command import SampleArgs, load_source
from dit_jax.generation.prompts import asked_of
from dit_jax.generation.sampling import SamplingOptions, device_mesh, load_vae, make_latent_sampler
from dit_jax.interop import keymap, sd3
from dit_jax.interop.formats import read_weights
from dit_jax.interop.lora import write_lora
from dit_jax.interop.sd3_pipeline import write_sd3_pipeline
from dit_jax.interop.weights import Reading
from dit_jax.models.autoencoder_kl import from_latents
from dit_jax.models.create import build_model, init_params
from dit_jax.models.lora import merged, with_lora
from dit_jax.runs.convert import convert, metadata_of, read_run
from dit_jax.runs.weights import initial_weights
from dit_jax.samplers.course import FlowCourse
from dit_jax.samplers.grid import make_times

# diffusers hands torch tensors to NumPy.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)

PROMPTS, STEPS, SCALE = ["a cat", "two dogs"], 10, 5.0
FORMS = {"sd3": {}, "sd3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}}


@pytest.fixture(scope="module")
def pipelines(make_sd3, tmp_path_factory):
    """A function of a form that gives (diffusers' pipeline, the folder that it wrote)."""
    made = {}

    def of(form):
        if form not in made:
            pipeline = make_sd3(**FORMS[form])
            pipeline.set_progress_bar_config(disable=True)
            pipeline.save_pretrained(folder := tmp_path_factory.mktemp("pipelines") / form)
            made[form] = pipeline, folder
        return made[form]

    return of


def read(folder, **said):
    return read_weights(str(folder), Reading(**said), "--from")


def their_pictures(pipeline, noise, **options):
    """(latents, pictures in [0, 1]) of diffusers' pipeline from this noise, both (N, h, w, C)."""
    import torch

    start = torch.tensor(np.moveaxis(np.asarray(noise), -1, 1))
    how = dict(
        guidance_scale=SCALE,
        num_inference_steps=STEPS,
        height=16,
        width=16,
        latents=start,
        max_sequence_length=256,
    )
    latents = pipeline(PROMPTS, **how, **options, output_type="latent").images
    with torch.no_grad():
        z = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
        pictures = pipeline.image_processor.postprocess(pipeline.vae.decode(z).sample, output_type="np")
    return np.moveaxis(latents.numpy(), 1, -1), pictures


def our_pictures(folder, **options):
    """(latents, pictures in [0, 1], start noise) of what sample.py --from does with the folder."""
    run = load_source(SampleArgs(source=str(folder)))
    model = build_model(run.config)
    asked = asked_of(SampleArgs(source=str(folder), prompt=PROMPTS), run, model).embedded(model.condition)
    how = SamplingOptions("euler", STEPS, SCALE, grid="sd3", **options)
    draw = make_latent_sampler(model, run.config, how, device_mesh(1))
    indices = np.arange(len(PROMPTS), dtype=np.int32)
    latents = np.asarray(draw(run.weights.params, 0, indices, asked.named, asked.null))
    metadata = metadata_of(run.weights)
    vae, params = load_vae(metadata)
    z = from_latents(jnp.asarray(latents), metadata.scaling_factor, metadata.shift_factor)
    pictures = vae.apply({"params": params}, z, method="decode")
    noise = start_noise(sample_keys(jax.random.key(0), indices), latents.shape[1:])
    return latents, np.clip(np.asarray(pictures) / 2 + 0.5, 0, 1), noise


def agree(ours, theirs):
    scale = np.abs(theirs[0]).max()
    assert scale < 50 and theirs[1].std() > 0.05  # there is something to compare
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4 * max(1.0, scale))
    assert np.abs(ours[1] - theirs[1]).max() < 1 / 255


@pytest.mark.parametrize("form", FORMS)
def test_same_latents_and_pictures(pipelines, form):
    pipeline, folder = pipelines(form)
    *ours, noise = our_pictures(folder)
    agree(ours, their_pictures(pipeline, noise))


@pytest.mark.parametrize("form", FORMS)
def test_same_with_skip_layer_guidance(pipelines, form):
    """In steps 2, 3 and 4 of 10: those after a share of 0.1 and before one of 0.5."""
    pipeline, folder = pipelines(form)
    skip = {"skip_layers": (0, 1), "skip_scale": 2.5, "skip_interval": (0.1, 0.5)}
    *ours, noise = our_pictures(folder, **skip)
    theirs = their_pictures(
        pipeline, noise, skip_guidance_layers=[0, 1], skip_layer_guidance_scale=2.5,
        skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.5,
    )  # fmt: skip
    agree(ours, theirs)
    assert np.abs(theirs[0] - their_pictures(pipeline, noise)[0]).max() > 0.01


def test_the_schedule_is_theirs(peers):
    _, diffusers = peers
    for shift, steps in ((3.0, 28), (3.0, 1), (1.0, 50), (6.0, 4)):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        times = make_times(FlowCourse(FlowMatching()), "sd3", steps, shift)
        np.testing.assert_allclose(1 - times, scheduler.sigmas.numpy(), atol=1e-6)


@pytest.mark.slow
def test_the_whole_pipeline_loads_our_low_rank_adaptation(pipelines, peers, tmp_path):
    """`load_lora_weights` of a folder as convert.py makes its file: the pictures are those of the moved weights."""
    pytest.importorskip("peft", reason="needs peft, by which diffusers loads adaptations")
    _, diffusers = peers
    plain, folder = pipelines("sd3.5")
    weights, lora = read(folder), LoraConfig(rank=2, alpha=3.0)
    rng = np.random.default_rng(0)
    params = with_lora(weights.params, lora, jax.random.key(0))
    params["lora"] = jax.tree.map(lambda a: 0.1 * rng.standard_normal(a.shape, np.float32), params["lora"])
    model = build_model(dataclasses.replace(weights.config, lora=lora))
    (tmp_path / "lora").mkdir()
    write_lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors", params["lora"], model, lora)
    write_sd3_pipeline(tmp_path / "moved", dataclasses.replace(weights, params=merged(params, lora)))

    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(tmp_path / "lora")
    assert theirs.get_list_adapters() == {"transformer": ["default_0"]}
    *ours, noise = our_pictures(tmp_path / "moved")
    agree(ours, their_pictures(theirs, noise))
    assert np.abs(ours[0] - their_pictures(plain, noise)[0]).max() > 0.1


# -------------------------------------------------------------------------------- other ways to the same


def same_bits(a, b):
    a, b = keymap.flatten(a), keymap.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.fixture
def sharded(pipelines, tmp_path):
    """The pipeline of the first form with its network in several files, and without its encoders' weights."""
    pipeline, folder = pipelines("sd3")
    shutil.copytree(folder, tmp_path / "p", ignore=shutil.ignore_patterns("*.safetensors"))
    pipeline.transformer.save_pretrained(tmp_path / "p" / "transformer", max_shard_size="100KB")
    shutil.copytree(folder / "vae", tmp_path / "p" / "vae", dirs_exist_ok=True)
    return tmp_path / "p"


def test_weights_in_several_files_are_the_same(pipelines, sharded):
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 2
    found, whole = read(sharded), read(pipelines("sd3")[1])
    same_bits(found.params, whole.params)
    assert found.config == whole.config and found.latents.image_size == 16


def test_half_precision_is_read_with_its_positions(pipelines, tmp_path):
    """The published SD3 medium is in float16, and so is its table of positions."""
    folder = shutil.copytree(pipelines("sd3")[1], tmp_path / "p")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        safetensors.numpy.save_file({name: tensor.astype(dtype) for name, tensor in tensors.items()}, file)
        near = keymap.flatten(read(folder).params)
        whole = keymap.flatten(read(pipelines("sd3")[1]).params)
        assert max(np.abs(near[name] - whole[name]).max() for name in whole) < 0.01
    tensors["pos_embed.pos_embed"] = tensors["pos_embed.pos_embed"] + 0.1
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"of other values: pos_embed\.pos_embed"):
        read(folder)


def test_a_published_single_file_is_read(make_sd3, tmp_path):
    sizes = dict(num_attention_heads=1, attention_head_dim=64, caption_projection_dim=64, sample_size=128)
    pipeline = make_sd3(**sizes, **FORMS["sd3.5"], pos_embed_max_size=64)
    pipeline.save_pretrained(tmp_path / "p")
    weights = read(tmp_path / "p")
    tensors = sd3.state_dict_from_params(weights.params, build_model(weights.config), single_file=True)
    beside = {"first_stage_model.x": np.zeros(2, np.float32), "text_encoders.y": np.zeros(2, np.float32)}
    file = tmp_path / "sd3.5_tiny.safetensors"
    prefixed = {sd3.SINGLE_FILE_PREFIX + name: tensor for name, tensor in tensors.items()}
    for content in (prefixed | beside, tensors):
        safetensors.numpy.save_file(content, file)
        found = read(file)
        same_bits(found.params, weights.params)
        assert (
            found.config.model == weights.config.model and found.config.diffusion == weights.config.diffusion
        )
        assert found.source == "sd3.5_tiny.safetensors" and found.latents.image_size == 1024


# -------------------------------------------------------------------------------------------- the way back


def test_a_run_and_back_is_the_same_to_the_bit(pipelines, peers, tmp_path, capsys):
    _, diffusers = peers
    pipeline, folder = pipelines("sd3.5")
    convert(str(folder), str(tmp_path / "run"), "run", Reading())
    convert(str(tmp_path / "run"), str(tmp_path / "back"), "diffusers", Reading())
    assert capsys.readouterr().err == ""
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "back")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        ours, theirs = (
            {name: tensor.numpy() for name, tensor in getattr(of, part).state_dict().items()}
            for of in (again, pipeline)
        )
        positions = [of.pop("pos_embed.pos_embed", np.zeros(1)) for of in (ours, theirs)]
        np.testing.assert_allclose(
            *positions, atol=1e-6
        )  # computed, not stored: their last bits are their maker's
        same_bits(ours, theirs)
    assert again.transformer.config.dual_attention_layers == [0] and again.scheduler.config.shift == 3.0
    assert again.tokenizer_3(["a cat"]).input_ids == pipeline.tokenizer_3(["a cat"]).input_ids
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    again.set_progress_bar_config(disable=True)
    agree(their_pictures(again, noise), their_pictures(pipeline, noise))


def test_encoders_that_lie_elsewhere_are_left_out_and_named(pipelines, peers, tmp_path, capsys):
    _, diffusers = peers
    weights = dataclasses.replace(read(pipelines("sd3")[1]), texts="stabilityai/somewhere")
    said = write_sd3_pipeline(tmp_path / "out", weights)
    assert said.startswith("without text_encoder, tokenizer, ") and "stabilityai/somewhere" in said
    none = dict.fromkeys(SD3_FOLDERS)
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", **none)
    assert again.text_encoder is None and again.transformer.config.num_layers == 3


def test_a_bundle_for_the_hub_keeps_where_the_encoders_lie(pipelines, tmp_path):
    _, folder = pipelines("sd3")
    convert(str(folder), str(tmp_path / "hub"), "folder", Reading())
    found = read(tmp_path / "hub")
    same_bits(found.params, read(folder).params)
    assert found.texts == str(folder) and "--text.encoder sd3" in (tmp_path / "hub" / "README.md").read_text()


def test_a_run_made_of_a_pipeline_is_sampled_and_trained_on(pipelines, tmp_path):
    """The run knows its encoders, and that an empty prompt is what its guidance leads away from."""
    _, folder = pipelines("sd3")
    convert(str(folder), str(tmp_path / "run"), None, Reading())
    asked = []
    for place in ({"workdir": str(tmp_path / "run")}, {"source": str(folder)}):
        args = SampleArgs(**place, prompt=PROMPTS)
        run = load_source(args)
        model = build_model(run.config)
        asked.append(asked_of(args, run, model).embedded(model.condition))
    first, second = asked
    same_bits(first.named, second.named)
    same_bits(first.null, second.null)
    assert first.negative == "" and first.place == second.place == str(folder)

    given = read_run(str(tmp_path / "run"), Reading())
    train = dataclasses.replace(given.config.train, init_from=str(tmp_path / "run"))
    config = dataclasses.replace(given.config, train=train)
    fresh = init_params(build_model(config), config, jax.random.key(0))
    whole = jax.sharding.NamedSharding(device_mesh(1), jax.sharding.PartitionSpec())
    same_bits(jax.device_get(initial_weights(config, jax.device_put(fresh, whole))), given.params)


# --------------------------------------------------------------------------------------- what is refused


def refused(place, **said):
    with pytest.raises(ConfigError) as error:
        read(place, **said)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_damaged_folders_are_named(sharded):
    shard = sorted((sharded / "transformer").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert f"{shard} is not a whole safetensors file" in refused(sharded)
    shard.unlink()
    assert f"has no {shard.name}; expected it, as" in refused(sharded)
    index = sharded / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    assert "has no ../../etc/passwd" in refused(sharded)
    index.write_text("[]")
    assert f"{index} cannot be read" in refused(sharded)
    index.unlink()
    assert "has no diffusion_pytorch_model.safetensors, nor an index of it" in refused(sharded)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}, "is of a FluxTransformer2DModel"),
        ("transformer/config.json", {"num_layers": "3"}, "has num_layers '3'"),
        ("transformer/config.json", {"qk_norm": "layer_norm"}, "has qk_norm 'layer_norm'; expected 'rms_norm'"),
        ("transformer/config.json", {"dual_attention_layers": [1]}, "has dual_attention_layers [1]; expected [0]"),
        ("transformer/config.json", {"caption_projection_dim": 64}, "caption_projection_dim 64; expected 32"),
        ("transformer/config.json", {"out_channels": 8}, "out_channels 8; expected 4"),
        ("transformer/config.json", {"pooled_projection_dim": 41}, "pooled_projection_dim 41; expected 40"),
        ("transformer/config.json", {"num_layers": 4}, "missing: transformer_blocks.2"),
        ("transformer/config.json", {"sample_size": 64}, "cannot be used: --model.input-size"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting True"),
        ("scheduler/scheduler_config.json", {"shift": -1}, "shift -1; expected"),
        ("text_encoder/config.json", {"projection_dim": None}, "have no projection_dim"),
    ],
)  # fmt: skip
def test_other_networks_are_refused(sharded, file, changes, message):
    found = json.loads((sharded / file).read_text())
    (sharded / file).write_text(json.dumps(found | changes))
    assert message in refused(sharded)


def test_networks_that_the_pipeline_does_not_have(pipelines, tmp_path):
    weights = read(pipelines("sd3")[1])
    for group, changes, message in (
        (
            "diffusion",
            {"time_scale": 1.0},
            "--diffusion.time-scale is 1.0; StableDiffusion3Pipeline needs 1000.0",
        ),
        ("diffusion", {"path": "gvp"}, "--diffusion.path is gvp"),
        ("model", {"mlp_ratio": 2.0}, "--model.mlp-ratio is 2.0"),
    ):
        part = dataclasses.replace(getattr(weights.config, group), **changes)
        other = dataclasses.replace(weights, config=dataclasses.replace(weights.config, **{group: part}))
        with pytest.raises(ConfigError, match=message):
            write_sd3_pipeline(tmp_path / "out", other)
