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
    """Images per second and the share of the devices' peak, over the time between lines of the log."""

    def __init__(self, config: Config, num_devices: int) -> None:
        self._batch_size = config.train.batch_size
        self._flops_per_image = cost.train_flops_per_image(config)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * num_devices if peak else None
        self._since: float | None = None
        self._step = 0

    @property
    def started(self) -> bool:
        """Whether a lap is running."""
        return self._since is not None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - start

    def lap(self, step: int) -> dict[str, float]:
        """Rates since the last call; {} at the first."""
        now, rates = time.perf_counter(), {}
        if self._since is not None:
            rate = (step - self._step) * self._batch_size / (now - self._since)
            rates["images_per_second"] = rate
            if self._peak:
                rates["mfu"] = rate * self._flops_per_image / self._peak
        self._since, self._step = now, step
        return rates
