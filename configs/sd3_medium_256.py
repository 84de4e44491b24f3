"""Stable Diffusion 3 medium at 256x256 (32x32x16 latents), the paper's recipe (arXiv 2403.03206).

    python prepare.py --source tar:shards --vae stabilityai/stable-diffusion-3-medium-diffusers \
        --text-encoder stabilityai/stable-diffusion-3-medium-diffusers --image-size 256 --out data/sd3_256
    python train.py --config configs/sd3_medium_256.py
    python train.py --config configs/sd3_medium_256.py --compile-for v5e:16x16
    python sample.py --workdir runs/sd3_medium_256 --prompt "a red house by a lake" --cfg-scale 5

Flow matching with logit-normal times, captions by CLIP-L, CLIP-G and T5-XXL, each left out 46.4% of the time
(appendix B.3), AdamW at 1e-4 after 1,000 steps, and the first stage's batch and steps: 4,096 and 500,000. Pictures
are not mirrored: captions may say left and right.
Hardware: several nodes of 8 GPUs with 80 GB, or a TPU slice of 64 to 256 chips; 2.53 TFLOP per image.
Result to expect: none is published for this size and data of your own.
"""

from dit_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    FlowMatchingConfig,
    MeshConfig,
    MMDiTConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
)

config = Config(
    model=MMDiTConfig(name="SD3-medium", input_size=(32, 32)),
    text=TextConfig(encoder="sd3", dropout=0.0, encoder_dropout=0.464),
    compute=ComputeConfig(dtype="bfloat16", remat="dots_attention"),
    diffusion=FlowMatchingConfig(
        times="logit_normal", shift=1.0, time_scale=1000.0, time_direction="to_noise"
    ),
    data=DataConfig(dir="data/sd3_256", mirror=False),
    optim=OptimConfig(learning_rate=1e-4, warmup_steps=1000, eps=1e-15, ema_decay=0.9999),
    mesh=MeshConfig(preset="fsdp"),
    train=TrainConfig(workdir="runs/sd3_medium_256", batch_size=4096, steps=500_000),
)
