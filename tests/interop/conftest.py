"""Tiny networks of other people's classes, with random weights everywhere."""

import json
import warnings

import pytest

SIDE, CHANNELS = 8, 4


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
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=SIDE, in_channels=CHANNELS,
        out_channels=2 * CHANNELS, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    first, *others = transformer.transformer_blocks
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(0.15 * torch.randn_like(parameter))
        for block in others:
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=CHANNELS,
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
