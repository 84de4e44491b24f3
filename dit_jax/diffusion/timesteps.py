"""Which timesteps are used: a subset of them for sampling, a random one per example for training."""

from __future__ import annotations

from itertools import accumulate, repeat

import jax
import jax.numpy as jnp
import numpy as np


def space_timesteps(num_timesteps: int, respacing: str) -> np.ndarray:
    """The original timesteps that a respaced process keeps, ascending, int32.

    respacing:
        ""          all of them;
        "250"       250, evenly spread from the first to the last (arXiv 2102.09672, sec. 4);
        "10,15,20"  that many in each of three equal sections;
        "ddim50"    50 at a constant integer stride from 0 (arXiv 2010.02502).

    Raises ValueError when the string cannot be read or the timesteps do not allow it.
    """
    if respacing == "":
        return np.arange(num_timesteps, dtype=np.int32)
    choose = _strided if respacing.startswith("ddim") else _sections
    kept = choose(num_timesteps, respacing)
    if len(kept) < 2:
        raise ValueError(f"respacing {respacing!r} keeps {len(kept)} timestep; expected at least 2")
    return np.array(kept, dtype=np.int32)


def _count(text: str, respacing: str) -> int:
    # isdecimal also takes other scripts' digits, which isascii leaves out.
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ValueError(
            f"respacing is {respacing!r}; expected positive step counts such as '250', '10,15,20' or 'ddim50'"
        )
    return int(text)


def _strided(num_timesteps: int, respacing: str) -> list[int]:
    count = _count(respacing.removeprefix("ddim"), respacing)
    for stride in range(1, num_timesteps):
        kept = range(0, num_timesteps, stride)
        if len(kept) == count:
            return list(kept)
    raise ValueError(
        f"respacing is {respacing!r}; expected a count that an integer stride over {num_timesteps} gives"
    )


def _sections(num_timesteps: int, respacing: str) -> list[int]:
    counts = [_count(part.strip(), respacing) for part in respacing.split(",")]
    size, extra = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if count > length:
            raise ValueError(
                f"respacing is {respacing!r}; expected at most {length} timesteps in section {i + 1}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Strides are summed, not multiplied, so that ties round as in the published code.
        kept += [start + round(offset) for offset in accumulate(repeat(stride, count - 1), initial=0.0)]
        start += length
    return kept


def sample_timesteps(key: jax.Array, n: int, num_timesteps: int) -> jax.Array:
    """Uniform random steps 0..num_timesteps - 1 for n training examples, (n,) int32."""
    return jax.random.randint(key, (n,), 0, num_timesteps, dtype=jnp.int32)
