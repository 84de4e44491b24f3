"""Other people's weights: published checkpoints and diffusers folders."""
