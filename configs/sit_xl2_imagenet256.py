"""SiT-XL/2 on ImageNet at 256x256 (32x32x4 latents), the paper's recipe (arXiv 2401.08740).

    python prepare.py --source tfds:imagenet2012 --vae stabilityai/sd-vae-ft-ema --image-size 256 \\
        --out data/imagenet256
    python train.py --config configs/sit_xl2_imagenet256.py
    python sample.py --workdir runs/sit_xl2_imagenet256 --sampler euler_maruyama --steps 250 --cfg-scale 1.5 \\
        --cfg-channels 3

The network, data and optimizer of DiT-XL/2 (configs/dit_xl2_imagenet256.py), trained by flow matching: linear path,
velocity, times drawn evenly and shown as they are. As in the published networks, a second half of output channels is
there and read by nothing.
Hardware: a node of 8 GPUs with 80 GB or more, or a TPU slice of 16 to 256 chips; 711.8 GFLOP per image.
Result to expect, the paper's FID-50K by the SDE at 7 million steps: 8.3 without guidance, 2.06 with guidance 1.5.
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
    diffusion=FlowMatchingConfig(path="linear", prediction="velocity", learn_sigma=True),
    data=DataConfig(dir="data/imagenet256"),
    optim=OptimConfig(learning_rate=1e-4, ema_decay=0.9999),
    mesh=MeshConfig(preset="fsdp"),
    train=TrainConfig(workdir="runs/sit_xl2_imagenet256", batch_size=256, steps=7_000_000),
)
