"""TPU generations, and the chips of a topology that is not here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from dit_jax.config import ConfigError
from dit_jax.devices import peak_flops

EXAMPLES = "v4:4x4x4, v5e:16x16, v5p:4x4x4 or v6e:16x16"


@dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Attributes: `hbm_gib` memory of a chip and `flops_per_cycle` of its matrix units in bfloat16 (Google Cloud's
    TPU pages; v6e's from the compiler's own estimate of a large product); the clock follows from the datasheet's
    peak. `ici` is what a chip sends along one axis of the torus, both directions, in bytes/s ("How to Scale
    Your Model", chapter on TPUs). `dcn` is a chip's share of the network between slices, bytes/s (v5e, v6e: Google
    Cloud's page of v6e, 6.4 and 25.6 Tbit/s for 256 chips; of v4 and v5p 200 Gbit/s for a host of four is assumed).
    """

    name: str
    hbm_gib: float
    flops_per_cycle: int
    ici: float
    dcn: float
    peak_flops: float = 0.0

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.peak_flops / self.flops_per_cycle


CHIPS = (
    Chip("v4", 32, 2 * 4 * 2 * 128 * 128, 9e10, 6.25e9, peak_flops("TPU v4") or 0),
    Chip("v5e", 16, 4 * 2 * 128 * 128, 9e10, 3.125e9, peak_flops("TPU v5 lite") or 0),
    Chip("v5p", 95, 2 * 4 * 2 * 128 * 128, 1.8e11, 6.25e9, peak_flops("TPU v5") or 0),
    Chip("v6e", 32, 4 * 2 * 256 * 256, 1.8e11, 1.25e10, peak_flops("TPU v6 lite") or 0),
)


def topology_devices(topology: str, slices: int = 1) -> tuple[Chip, Sequence[Any]]:
    """The chip and the devices of so many slices of a topology such as "v5e:16x16", without any TPU; needs libtpu.

    One device is one chip: on v4 the two cores of a chip work as one, as they do by default on Google Cloud.
    Raises ConfigError for an unknown name or without libtpu.
    """
    chip = next((c for c in CHIPS if c.name == topology.partition(":")[0]), None)
    if chip is None:
        raise ConfigError(f"--compile-for is {topology!r}; expected a TPU topology such as {EXAMPLES}")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--compile-for needs the TPU compiler: pip install libtpu (Linux, x86-64)"
        ) from None
    # The compiler must not look for a TPU, its metadata server, or for other processes that hold one.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    if slices > 1:
        options["num_slices"] = slices
    try:
        return chip, topologies.get_topology_desc(topology, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise ConfigError(
            f"--compile-for is {topology!r}, which the compiler does not know ({reason}); expected a TPU "
            f"topology such as {EXAMPLES}"
        ) from None
