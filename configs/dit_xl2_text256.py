"""DiT-XL/2 with text at 256x256 (32x32x4 latents): captions by Qwen3-0.6B, beside adaLN-Zero and by cross-attention.

    python prepare.py --source tar:shards --vae stabilityai/sd-vae-ft-ema --image-size 256 \\
        --text-encoder Qwen/Qwen3-0.6B --out data/text256
    python train.py --config configs/dit_xl2_text256.py
    python sample.py --workdir runs/dit_xl2_text256 --prompt "a red house by a lake" --cfg-scale 4

Flow matching with logit-normal times, the last hidden states of a small language model at 256 tokens, and the
optimizer of diffusion-bench's text-to-image recipe (arXiv 2606.24888), on DiT-XL/2 with PixArt's block (arXiv
2310.00426). `--model.conditioning in_context` joins the text's tokens to the sequence instead, as that work does.
Pictures are not mirrored: captions may say left and right.
Hardware: a node of 8 GPUs with 80 GB or more, or a TPU slice of 16 to 256 chips; 967 GFLOP per image.
Result to expect: none is published for this network and data of your own.
"""

from dit_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    FlowMatchingConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
)

config = Config(
    model=ModelConfig(name="DiT-XL/2"),
    text=TextConfig(encoder="Qwen/Qwen3-0.6B", length=256, dropout=0.1),
    compute=ComputeConfig(dtype="bfloat16", remat="dots_attention"),
    diffusion=FlowMatchingConfig(times="logit_normal", time_scale=1000.0),
    data=DataConfig(dir="data/text256", mirror=False),
    optim=OptimConfig(learning_rate=2e-4, b2=0.95, ema_decay=0.9995, grad_clip=1.0),
    mesh=MeshConfig(preset="fsdp"),
    train=TrainConfig(workdir="runs/dit_xl2_text256", batch_size=1024, steps=400_000),
)
