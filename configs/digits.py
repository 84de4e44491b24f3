"""The embedded default: scikit-learn's digits at 32x32 as 8x8x4 latents, in minutes on two CPU cores."""

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
    diffusion=DiffusionConfig(),
    data=DataConfig(dir="data/digits", source="digits", mirror=False, cache="ram"),
    optim=OptimConfig(
        learning_rate=1e-3, warmup_steps=100, schedule="cosine", ema_decay=0.995, grad_clip=1.0
    ),
    train=TrainConfig(
        workdir="runs/digits",
        batch_size=128,
        steps=1200,
        log_every=50,
        checkpoint_every=600,
        sample_every=400,
        sample_count=100,
    ),
)
