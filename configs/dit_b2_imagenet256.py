"""DiT-B/2 on ImageNet at 256x256 (32x32x4 latents), the paper's recipe (arXiv 2212.09748, section 4).

    python prepare.py --source tfds:imagenet2012 --vae stabilityai/sd-vae-ft-ema --image-size 256 \\
        --out data/imagenet256
    python train.py --config configs/dit_b2_imagenet256.py

Hardware: one GPU with 24 GB or more (with --train.microbatch 32, say), a node of GPUs, or a TPU slice of 4 to 64
chips; 138 GFLOP per image and 2.1 GB of state, which every device holds whole.
Result to expect: FID-50K 43.47 without guidance at 400,000 steps (the paper's table 4).
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
    model=ModelConfig(name="DiT-B/2"),
    compute=ComputeConfig(dtype="bfloat16", remat="dots_attention"),
    data=DataConfig(dir="data/imagenet256"),
    optim=OptimConfig(learning_rate=1e-4, ema_decay=0.9999),
    mesh=MeshConfig(preset="replicated"),
    train=TrainConfig(workdir="runs/dit_b2_imagenet256", batch_size=256, steps=400_000),
)
