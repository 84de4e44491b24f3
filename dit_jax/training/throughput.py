"""How fast a run is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax

from dit_jax.config import Config
from dit_jax.devices import peak_flops
from dit_jax.models import cost


class Throughput:
    """Images per second and the share of the devices' peak, over the time between lines of the log.

    `count` every step, with the height and width of its latents: what an image costs depends on them.
    """

    def __init__(self, config: Config, num_devices: int) -> None:
        self._batch_size = config.train.batch_size
        sizes = (config.model.input_size, *config.data.sizes)
        self._flops_per_image = {
            size: cost.train_flops_per_image(cost.of_size(config, size)) for size in sizes
        }
        self._images, self._flops = 0, 0
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * num_devices if peak else None
        self._since: float | None = None

    @property
    def started(self) -> bool:
        """Whether a lap is running."""
        return self._since is not None

    def count(self, size: tuple[int, int]) -> None:
        """A step on a batch of latents of this size has been asked for."""
        self._images += self._batch_size
        self._flops += self._batch_size * self._flops_per_image[size]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Rates since the last call; {} at the first."""
        now, rates = time.perf_counter(), {}
        if self._since is not None:
            seconds = now - self._since
            rates["images_per_second"] = self._images / seconds
            if self._peak:
                rates["mfu"] = self._flops / seconds / self._peak
        self._since, self._images, self._flops = now, 0, 0
        return rates
