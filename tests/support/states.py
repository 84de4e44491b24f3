"""A training state without a network, for tests of checkpoints and for the processes that they start."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.runs.state import TrainState

META = {"config": {}, "dataset": "d"}


def made_up_state(step, kilobytes=1):
    """A state whose arrays are split over all devices of all processes, 4 * kilobytes in all."""
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def put(x, spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    rng = np.random.default_rng(step)
    size = (8, 16 * kilobytes)
    params = {f"w{i}": put(rng.normal(size=size).astype(np.float32), PartitionSpec("data")) for i in range(2)}
    zero = put(np.zeros((), np.int32), PartitionSpec())
    return TrainState(
        step=put(np.asarray(step, np.int32), PartitionSpec()), params=params, opt_state={"m": params},
        ema=(params, params), skipped=zero, bad_streak=zero, data_offset=zero, totals={"loss": zero},
    )  # fmt: skip
