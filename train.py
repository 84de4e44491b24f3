"""Train a Diffusion Transformer: python train.py [--config configs/RECIPE.py] [--option value ...]."""

import sys

from dit_jax.config import ConfigError, parse_args


def main() -> int:
    """Exit code 0 when the run is finished, 2 for a bad option."""
    try:
        config = parse_args()
        from dit_jax.training.loop import train

        train(config)
    except ConfigError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
