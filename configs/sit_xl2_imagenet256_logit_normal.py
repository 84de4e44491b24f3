"""SiT-XL/2 on ImageNet at 256x256 (32x32x4 latents) with logit-normal training times (arXiv 2403.03206, section 3.1).

    python prepare.py --source tfds:imagenet2012 --vae stabilityai/sd-vae-ft-ema --image-size 256 \\
        --out data/imagenet256
    python train.py --config configs/sit_xl2_imagenet256_logit_normal.py

As configs/sit_xl2_imagenet256.py, but times in the middle, where the velocity is hardest to tell, are drawn more
often than those near noise and data.
Hardware: a node of 8 GPUs with 80 GB or more, or a TPU slice of 16 to 256 chips; 711.8 GFLOP per image.
Result to expect: none is published for this network and data; the distribution is the one that the text-to-image
study above found best among those it compared.
"""

from dit_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    FlowMatchingConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

config = Config(
    model=ModelConfig(name="DiT-XL/2"),
    compute=ComputeConfig(dtype="bfloat16", remat="dots_attention"),
    diffusion=FlowMatchingConfig(times="logit_normal", logit_mean=0.0, logit_std=1.0, learn_sigma=True),
    data=DataConfig(dir="data/imagenet256"),
    optim=OptimConfig(learning_rate=1e-4, ema_decay=0.9999),
    mesh=MeshConfig(preset="fsdp"),
    train=TrainConfig(workdir="runs/sit_xl2_imagenet256_logit_normal", batch_size=256, steps=400_000),
)
