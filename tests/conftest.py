"""Strict test environment: 8 virtual CPU devices, no silent rank promotion, warnings are errors."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import warnings

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import started

from dit_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    resolve,
)
from dit_jax.data.encode import prepare
from dit_jax.data.encoders import Encoder, compile_encode
from dit_jax.data.sources import ArraySource
from dit_jax.training.program import build_program
from dit_jax.training.sharding import batch_sharding, make_mesh

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", ".cache/jax")  # a second run of the tests compiles little
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_default_matmul_precision", "highest")
jax.devices()  # now: a test may change the environment that they are made from, for the processes that it starts


@pytest.fixture
def default_precision():
    """Products as users get them: at jax's default precision, where the other tests ask for the highest."""
    with jax.default_matmul_precision(None):
        yield


@pytest.fixture(scope="session")
def data_dir():
    """tests/data: the small golden files."""
    return pathlib.Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def sit(data_dir):
    """Numbers recorded from SiT, by name; arrays in its layout."""
    import numpy as np

    with np.load(data_dir / "sit.npz") as data:
        return dict(data)


@pytest.fixture(scope="session")
def sit_network(sit):
    """The recorded network, jitted: (x, t) -> output, for the recorded labels."""
    from dit_jax import DiT
    from dit_jax.interop.official import params_from_state_dict

    settings = {k.removeprefix("config/"): v.item() for k, v in sit.items() if k.startswith("config/")}
    state = {k.removeprefix("params/"): v for k, v in sit.items() if k.startswith("params/")}
    model = DiT(**settings)
    params = params_from_state_dict(state, model)
    return jax.jit(lambda x, t: model.apply({"params": params}, x, t, jax.numpy.asarray(sit["y"])))


@pytest.fixture
def hurried():
    """Programs compiled as in the processes that tests start: without the compiler's optimizations, in a fifth of
    the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _no_process_is_left():
    """A test that fails ends what it started: some would go on for ever."""
    yield
    started.end_all()


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives the folder of a new file system with room for that many megabytes."""
    mounted = []

    def make(megabytes):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip(
                "needs a file system that can be full: run as root, or under `unshare -rm`, to mount a tmpfs"
            )
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# A tiny model, its config and a fake dataset of smooth latents, for whole runs.


def tiny_config(**parts) -> Config:
    """A resolved config of a 2-layer model on 8x8x4 latents; `model=dict(...)` and so on override.

    Adam's eps is well above the rounding error of a gradient (1e-9): runs that add in another order would move
    by steps of another sign where a gradient is zero but for rounding, as the keys' biases' is.
    """
    base = Config(
        model=ModelConfig(
            name="DiT-S/2",
            depth=2,
            hidden_size=32,
            num_heads=2,
            input_size=(8, 8),
            num_classes=4,
            mlp_ratio=2.0,
        ),
        diffusion=DiffusionConfig(num_timesteps=100),
        data=DataConfig(mirror=True),
        optim=OptimConfig(learning_rate=1e-3, eps=1e-6, grad_clip=1.0, weight_decay=0.01),
        mesh=MeshConfig(),
        train=TrainConfig(batch_size=16, steps=4, log_every=2, checkpoint_every=2, sample_every=0),
    )
    for group, values in parts.items():
        base = dataclasses.replace(base, **{group: dataclasses.replace(getattr(base, group), **values)})
    return resolve(base)


def random_batch(step: int, size: int = 16, views: int = 2) -> dict[str, np.ndarray]:
    """Moments (B, M, 8, 8, 8), labels (B,) and bytes of captions (B, 16) of one step, on the host."""
    rng = np.random.default_rng(step)
    mean = rng.normal(size=(size, views, 8, 8, 4))
    std = rng.uniform(0.05, 0.1, size=(size, views, 8, 8, 4))
    moments = np.concatenate([mean, std], axis=-1).astype(np.float16)
    labels = rng.integers(0, 4, size).astype(np.int32)
    tokens = rng.integers(2, 258, (size, 16)).astype(np.int32)
    tokens[:, 0] = 1
    there = np.arange(16)[None] < rng.integers(1, 17, (size, 1))
    return {"moments": moments, "label": labels, "tokens": np.where(there, tokens, 0).astype(np.int32)}


def run_steps(config: Config, num_devices: int, steps: int, state=None, first: int = 0):
    """(final state, metrics of every step on the host, program) on that many devices."""
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    program = build_program(config, mesh, scaling_factor=0.5, shift_factor=0.1)
    state = program.init() if state is None else state
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, program.state))
    history = []
    for step in range(first, first + steps):
        batch = jax.device_put(random_batch(step, config.train.batch_size), batch_sharding(mesh))
        state, metrics = program.step(state, batch)
        history.append(jax.device_get(metrics))
    return state, history, program


def relative_difference(tree, reference) -> float:
    """Largest |a - b| / |b| (norms) over the leaves."""

    def difference(a, b):
        a, b = np.asarray(a), np.asarray(b)
        return np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-12)

    return max(jax.tree.leaves(jax.tree.map(difference, tree, reference)))


@functools.cache
def one_device(conditioning: str):
    """(first state on the host, state after 5 steps, metrics of each) on one device."""
    config = tiny_config(model={"conditioning": conditioning})
    start = jax.device_get(run_steps(config, 1, 0)[0])
    return start, *run_steps(config, 1, 5, start)[:2]


@pytest.fixture(scope="session")
def tiny():
    """The helpers above as one object."""

    class Tiny:
        config = staticmethod(tiny_config)
        batch = staticmethod(random_batch)
        run = staticmethod(run_steps)
        reference = staticmethod(one_device)
        relative_difference = staticmethod(relative_difference)

    return Tiny


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """Folder of a real dataset of 40 random 8x8x4 latents with mirrors and 4 classes."""

    def encode(scale, images):  # (B, 16, 16, 3) -> mean and std (B, 8, 8, 4)
        b = images.shape[0]
        mean = scale * images[..., 0].reshape(b, 8, 2, 8, 2).swapaxes(2, 3).reshape(b, 8, 8, 4)
        return mean, 0.1 + 0.01 * jnp.abs(mean)

    encoder = Encoder(
        vae="fake", vae_hash="f" * 64, backend="flax", precision="float32", scaling_factor=0.5, shift_factor=0.1,
        factor=2, channels=4, devices=jax.local_device_count(), compile=compile_encode(encode, jnp.float32(2.0)),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    source = ArraySource("random", images, rng.integers(0, 4, 40), ("a", "b", "c", "d"))
    folder = tmp_path_factory.mktemp("latents") / "set"
    prepare(source, encoder, folder, image_size=16, shard_size=16, batch_size=8)
    return folder


# Other people's classes, with random weights everywhere.


@pytest.fixture(scope="session")
def peers():
    """(torch, diffusers), imported with their own warnings off."""
    torch = pytest.importorskip("torch", reason="needs torch (extra: interop)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: interop)")
        from diffusers import DiTPipeline  # noqa: F401  (imported lazily, with warnings)
    return torch, diffusers


@pytest.fixture(scope="session")
def peer_pipeline(peers):
    """A DiTPipeline of diffusers: depth 2, width 32, 16x16 pictures, 1,000 classes, its label table's null in use."""
    torch, diffusers = peers
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    first, *others = transformer.transformer_blocks
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(0.15 * torch.randn_like(parameter))
        for block in others:
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.7,
    ).eval()  # fmt: skip
    return diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False))


@pytest.fixture(scope="session")
def pipeline_folder(peer_pipeline, tmp_path_factory):
    """That pipeline as diffusers writes it, with names of classes as the published one has them."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    peer_pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): f"name {i}, other {i}" for i in range(1000)}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


# Stable Diffusion 3 in small: random encoders, and tokenizers of the printable characters, made here.


@pytest.fixture(scope="session")
def sd3_texts(peers):
    """Components of a StableDiffusion3Pipeline: CLIPs of 16 and 24 channels, a T5 of 48, and their tokenizers."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra: text)")
    torch, _ = peers
    torch.manual_seed(1)
    letters = [chr(i) for i in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    ids = {word: i for i, word in enumerate(words)}
    found = {}
    for name, width in (("", 16), ("_2", 24)):
        config = transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, projection_dim=width, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        found[f"text_encoder{name}"] = transformers.CLIPTextModelWithProjection(config).eval()
        found[f"tokenizer{name}"] = transformers.CLIPTokenizer(vocab=ids, merges=[], model_max_length=77)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((p, -3.0) for p in ["\u2581", *letters])]
    t5 = transformers.T5Config(
        vocab_size=len(pieces), d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    found["text_encoder_3"] = transformers.T5EncoderModel(t5).eval()
    found["tokenizer_3"] = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    with torch.no_grad():
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            for parameter in found[name].parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return found


@pytest.fixture(scope="session")
def make_sd3(peers, sd3_texts):
    """A function of a network's options that gives a StableDiffusion3Pipeline: depth 3, width 32, 16x16 pictures."""
    torch, diffusers = peers

    def make(**network):
        torch.manual_seed(2)
        sizes = dict(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
            num_attention_heads=2, caption_projection_dim=32, joint_attention_dim=48, pooled_projection_dim=40,
            pos_embed_max_size=12,
        )  # fmt: skip
        transformer = diffusers.SD3Transformer2DModel(**sizes | network).eval()
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.copy_(0.15 * torch.randn_like(parameter))
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=1.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
        ).eval()  # fmt: skip
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        return diffusers.StableDiffusion3Pipeline(
            transformer=transformer, scheduler=scheduler, vae=vae, **sd3_texts
        )

    return make


@pytest.fixture(scope="session")
def sd3_pipeline(make_sd3):
    """A small StableDiffusion3Pipeline of the first form."""
    return make_sd3()


@pytest.fixture(scope="session")
def sd3_folder(sd3_pipeline, tmp_path_factory):
    """That pipeline as diffusers writes it."""
    folder = tmp_path_factory.mktemp("sd3") / "small"
    sd3_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def google():
    """A server that is Google Cloud Storage to all its clients in this process and in those that it starts."""
    import bucket_server

    with bucket_server.google() as store:
        yield store


@pytest.fixture(scope="session")
def amazon():
    """A server that is Amazon S3, likewise."""
    import bucket_server

    with bucket_server.amazon() as store:
        yield store


@pytest.fixture(params=["google", "amazon"])
def store(request):
    """Each kind of store, with nothing wrong with it."""
    return request.getfixturevalue(request.param)
