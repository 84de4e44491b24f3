"""Whether samples can fit into memory at all: what cannot is refused before anything is drawn.

The figures are what is certainly held at the same time; the whole need is larger.
"""

from __future__ import annotations

from dit_jax.config import Config, ConfigError
from dit_jax.memory import device_memory, host_memory
from dit_jax.pictures import enlargement


def picture_bytes(count: int, side: int) -> int:
    """Bytes of so many pictures (side, side, 3) uint8."""
    return count * side * side * 3


def check_pictures(option: str, count: int, in_grid: int, side: int) -> None:
    """Raises ConfigError, naming the option, where `count` pictures, some of them in a grid, exceed the memory.

    count: those that are held, twice: as batches and as one array, or as two batches under way. A grid's are
    enlarged, and then copied into it.
    """
    needed = 2 * picture_bytes(count, side) + 2 * picture_bytes(min(in_grid, count), side * enlargement(side))
    room = host_memory()
    if needed > room:
        raise ConfigError(
            f"{option} is {count}: pictures of {needed / 1e9:.1f} GB, but there are {room / 1e9:.1f} GB of memory; "
            "expected fewer"
        )


def check_batch(config: Config, batch_size: int, guided: bool, devices: int) -> None:
    """Raises ConfigError where a device's share of a batch of samples exceeds its memory.

    A block holds its MLP's input and hidden layer at the same time; guidance computes every sample twice.
    """
    m, room = config.model, device_memory()
    assert m.hidden_size
    width = m.hidden_size + int(m.hidden_size * m.mlp_ratio)
    each = m.num_tokens * width * (2 if config.compute.dtype == "bfloat16" else 4) * (2 if guided else 1)
    needed = -(-batch_size // devices) * each
    if room is not None and needed > room:
        raise ConfigError(
            f"--batch-size is {batch_size}: {needed / 1e9:.1f} GB on each of {devices} devices, which has "
            f"{room / 1e9:.1f} GB; expected less, the pictures are the same"
        )
