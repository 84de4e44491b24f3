"""Stable Diffusion 3 medium at 1024x1024 (128x128x16 latents), the paper's recipe (arXiv 2403.03206).

    python prepare.py --source tar:shards --vae stabilityai/stable-diffusion-3-medium-diffusers \
        --text-encoder stabilityai/stable-diffusion-3-medium-diffusers --image-size 1024 --out data/sd3_1024
    python train.py --config configs/sd3_medium_1024.py --train.init-from runs/sd3_medium_512
    python train.py --config configs/sd3_medium_1024.py --compile-for v5p:8x8x4
    python sample.py --workdir runs/sd3_medium_1024 --prompt "a red house by a lake" --cfg-scale 5

The last stage, from the weights of the one before; as there, but times are moved towards the noise by 3.0: what the
paper found best at this resolution (section 5.3.2, equation 23). Batch and steps of this stage are our choice.
Hardware: many nodes of 8 GPUs with 80 GB, or a TPU slice of 256 chips; 26.7 TFLOP per image.
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
    model=MMDiTConfig(name="SD3-medium", input_size=(128, 128)),
    text=TextConfig(encoder="sd3", dropout=0.0, encoder_dropout=0.464),
    compute=ComputeConfig(dtype="bfloat16", remat="dots_attention"),
    diffusion=FlowMatchingConfig(
        times="logit_normal", shift=3.0, time_scale=1000.0, time_direction="to_noise"
    ),
    data=DataConfig(dir="data/sd3_1024", mirror=False),
    optim=OptimConfig(learning_rate=1e-4, warmup_steps=1000, eps=1e-15, ema_decay=0.9999),
    mesh=MeshConfig(preset="fsdp"),
    train=TrainConfig(workdir="runs/sd3_medium_1024", batch_size=512, steps=100_000),
)
