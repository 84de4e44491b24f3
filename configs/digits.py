"""The embedded default: scikit-learn's digits at 32x32 as 8x8x4 latents, in minutes on two CPU cores.

    python train.py && python sample.py --workdir runs/digits --cfg-scale 1.25 --steps 12

For a laptop's CPU. Differs from the paper's recipe where minutes count: the velocity is predicted on the cosine
schedule, which learns such small latents several times faster than the noise on the linear one, and the learning
rate is high, warmed up and decays. `make demo` prints the result to expect, measured by an independent classifier.
"""

from dit_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        name="DiT-S/2",
        depth=6,
        hidden_size=128,
        num_heads=4,
        input_size=(8, 8),
        in_channels=4,
        num_classes=10,
    ),
    diffusion=DiffusionConfig(schedule="squaredcos_cap_v2", prediction="v"),
    data=DataConfig(dir="data/digits", source="digits", mirror=False, cache="ram"),
    optim=OptimConfig(
        learning_rate=6e-3, warmup_steps=50, schedule="cosine", b2=0.99, ema_decay=0.995, grad_clip=1.0
    ),
    train=TrainConfig(
        workdir="runs/digits",
        batch_size=64,
        steps=1000,
        log_every=50,
        checkpoint_every=500,
        sample_every=500,
        sample_count=50,
        sample_steps=12,
        sample_cfg_scale=1.25,
    ),
)
