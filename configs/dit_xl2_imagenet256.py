"""DiT-XL/2 on ImageNet at 256x256 (32x32x4 latents), the paper's recipe (arXiv 2212.09748, section 4).

    python prepare.py --source tfds:imagenet2012 --vae stabilityai/sd-vae-ft-ema --image-size 256 \\
        --out data/imagenet256
    python train.py --config configs/dit_xl2_imagenet256.py
    python train.py --config configs/dit_xl2_imagenet256.py --compile-for v5e:16x16

Hardware: a node of 8 GPUs with 80 GB or more, or a TPU slice of 16 to 256 chips; 711.8 GFLOP per image. Up to 16
devices share the state (10.8 GB).
Result to expect, the paper's FID-50K: without guidance 19.47 at 400,000 steps (table 4) and 9.62 at 7 million; with
guidance 1.5 (on three channels, 250 DDPM steps) 2.27 at 7 million (table 2).
"""

from dit_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

config = Config(
    model=ModelConfig(name="DiT-XL/2"),
    compute=ComputeConfig(dtype="bfloat16", remat="dots_attention"),
    data=DataConfig(dir="data/imagenet256"),
    optim=OptimConfig(learning_rate=1e-4, ema_decay=0.9999),
    mesh=MeshConfig(preset="fsdp"),
    train=TrainConfig(workdir="runs/dit_xl2_imagenet256", batch_size=256, steps=400_000),
)
