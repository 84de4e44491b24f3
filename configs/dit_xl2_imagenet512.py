"""DiT-XL/2 on ImageNet at 512x512 (64x64x4 latents), the paper's recipe (arXiv 2212.09748, section 5.1).

    python prepare.py --source tfds:imagenet2012 --vae stabilityai/sd-vae-ft-ema --image-size 512 \\
        --out data/imagenet512
    python train.py --config configs/dit_xl2_imagenet512.py
    python train.py --config configs/dit_xl2_imagenet512.py --compile-for v5e:16x16

Hardware: two or more nodes of 8 GPUs with 80 GB, or a TPU slice of 64 to 256 chips; 3.15 TFLOP per image. Up to 16
devices share the state (10.8 GB).
Result to expect, the paper's FID-50K at 3 million steps (table 3): 12.03 without guidance, 3.04 with guidance 1.5
(on three channels, 250 DDPM steps).
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
    model=ModelConfig(name="DiT-XL/2", input_size=(64, 64)),
    compute=ComputeConfig(dtype="bfloat16", remat="dots_attention"),
    data=DataConfig(dir="data/imagenet512"),
    optim=OptimConfig(learning_rate=1e-4, ema_decay=0.9999),
    mesh=MeshConfig(preset="fsdp"),
    train=TrainConfig(workdir="runs/dit_xl2_imagenet512", batch_size=256, steps=3_000_000),
)
