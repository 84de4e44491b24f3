"""The digits by flow matching: the default's network, data and budget (configs/digits.py), another process.

    python train.py --config configs/digits_flow.py
    python sample.py --workdir runs/digits_flow --cfg-scale 1.25 --steps 12 --num-samples 1000 --npz flow.npz
    python evaluate.py --npz flow.npz

For a laptop's CPU. Straight paths from noise to data, whose velocity the network predicts (SiT, arXiv 2401.08740).
The network is shown 1000 t, as t alone moves few dimensions of its embedding. `--diffusion.times logit_normal` trains
more on the middle. The last command prints the result to expect, measured by an independent classifier.
"""

from dit_jax.config import Config, DataConfig, FlowMatchingConfig, ModelConfig, OptimConfig, TrainConfig

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
    diffusion=FlowMatchingConfig(path="linear", prediction="velocity", time_scale=1000.0),
    data=DataConfig(dir="data/digits", source="digits", mirror=False, cache="ram"),
    optim=OptimConfig(
        learning_rate=6e-3, warmup_steps=50, schedule="cosine", b2=0.99, ema_decay=0.995, grad_clip=1.0
    ),
    train=TrainConfig(
        workdir="runs/digits_flow",
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
