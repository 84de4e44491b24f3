"""Every layout of a run over 8 devices gives what one device gives, in less memory."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dit_jax.config import ConfigError, MeshConfig
from dit_jax.training.program import abstract_state
from dit_jax.training.sharding import (
    PARAMETER_AXES,
    PRESETS,
    bytes_per_device,
    check_batch,
    make_mesh,
    mesh_shape,
    partition_spec,
)

CONDITIONINGS = ("in_context", "cross_attention", "adaln", "adaln_zero")
MESHES = {
    "replicated": {"preset": "replicated"},
    "zero1": {"preset": "zero1"},
    "fsdp": {"preset": "fsdp", "data": 2, "fsdp": 4},
    "fsdp_tensor": {"preset": "fsdp_tensor", "data": 2, "fsdp": 2, "tensor": 2},
}


def every_layout():
    """Each preset with each conditioning; all but two are slow (each compiles for 8 devices)."""
    for preset in PRESETS:
        for conditioning in CONDITIONINGS:
            quick = conditioning == "adaln_zero" and preset in ("replicated", "fsdp_tensor")
            yield pytest.param(preset, conditioning, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("preset", "conditioning"), list(every_layout()))
def test_eight_devices_agree_with_one(tiny, preset, conditioning):
    start, one_state, one_metrics = tiny.reference(conditioning)
    config = tiny.config(model={"conditioning": conditioning}, mesh=MESHES[preset])
    state, metrics, _ = tiny.run(config, 8, 5, start)
    for now, reference in zip(metrics, one_metrics, strict=True):
        np.testing.assert_allclose(now["loss"], reference["loss"], rtol=1e-5)
        np.testing.assert_allclose(now["grad_norm"], reference["grad_norm"], rtol=1e-4)
    assert tiny.relative_difference(state.params, one_state.params) < 1e-5


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_state_takes_less_memory(tiny, conditioning):
    def part(preset, field):
        config = tiny.config(model={"conditioning": conditioning, "hidden_size": 64}, mesh=MESHES[preset])
        tree = getattr(abstract_state(config, make_mesh(config.mesh)), field)
        return bytes_per_device(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))

    whole = {field: part("replicated", field) for field in ("params", "opt_state", "ema")}
    assert part("zero1", "params") == whole["params"]
    assert part("zero1", "opt_state") < whole["opt_state"] / 8 * 1.3
    assert part("zero1", "ema") < whole["ema"] / 8 * 1.3
    for field in whole:
        assert part("fsdp", field) < whole[field] / 4 * 1.3
        assert part("fsdp_tensor", field) < whole[field] / 4 * 1.5


def test_arrays_lie_where_the_table_says(tiny):
    config = tiny.config(mesh=MESHES["fsdp_tensor"])
    state, _, program = tiny.run(config, 8, 1)
    qkv = state.params["blocks"]["attn"]["qkv"]["kernel"]
    assert qkv.sharding.spec == P(None, ("fsdp",), None, ("tensor",))
    assert qkv.addressable_shards[0].data.shape == (2, 16, 3, 1, 16)
    first = jax.devices()[0]
    held = [
        s.data.nbytes for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards if s.device == first
    ]
    assert sum(held) == bytes_per_device(
        program.state, jax.tree.map(lambda leaf: leaf.sharding, program.state)
    )
    same = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s.sharding, a.ndim), state, program.state)
    assert all(jax.tree.leaves(same))


def test_mesh_shapes():
    assert mesh_shape(MeshConfig(), 8) == (8, 1, 1)
    assert mesh_shape(MeshConfig(preset="fsdp"), 8) == (1, 8, 1)
    assert mesh_shape(MeshConfig(preset="fsdp", data=2), 8) == (2, 4, 1)
    assert mesh_shape(MeshConfig(preset="fsdp", fsdp=2), 8) == (4, 2, 1)
    assert mesh_shape(MeshConfig(preset="fsdp_tensor"), 8) == (1, 4, 2)
    assert mesh_shape(MeshConfig(preset="fsdp_tensor", data=-1, fsdp=2, tensor=2), 8) == (2, 2, 2)
    with pytest.raises(ConfigError, match=r"--mesh asks for data 3, fsdp -1.* the 8 devices"):
        mesh_shape(MeshConfig(preset="fsdp", data=3), 8)
    with pytest.raises(ConfigError, match=r"--mesh\.fsdp is 4; expected 1, because --mesh\.preset zero1"):
        mesh_shape(MeshConfig(preset="zero1", fsdp=4), 8)


def test_errors_name_parameter_and_axis(tiny):
    mesh = make_mesh(MeshConfig(preset="fsdp_tensor", data=1, fsdp=4, tensor=2))
    rules = PRESETS["fsdp_tensor"][0]
    with pytest.raises(
        ConfigError, match=r"parameter mlp/fc1/kernel.*axis 1 \(embed, size 30\).*mesh axis fsdp"
    ):
        partition_spec("mlp/fc1/kernel", (2, 30, 64), rules, mesh)
    with pytest.raises(ConfigError, match=r"parameter new/kernel has no row"):
        partition_spec("new/kernel", (2, 30, 64), rules, mesh)
    twice = (("square/kernel", ("embed", "embed")), *PARAMETER_AXES)
    with pytest.raises(
        ConfigError, match=r"square/kernel.*axes 0 and 1 \(embed\) are both split over mesh axis fsdp"
    ):
        partition_spec("square/kernel", (8, 8), rules, mesh, twice)
    with pytest.raises(ConfigError, match=r"--mesh\.tensor is 4; expected a divisor of --model\.num-heads 2"):
        tiny.run(tiny.config(mesh={"preset": "fsdp_tensor", "tensor": 4}), 8, 1)


def test_batch_must_divide():
    mesh = make_mesh(MeshConfig(preset="fsdp", data=2))
    assert check_batch(32, 0, mesh) == 1
    assert check_batch(32, 2, mesh) == 2
    with pytest.raises(ConfigError, match=r"--train\.batch-size is 12; expected a multiple of the 8 devices"):
        check_batch(12, 0, mesh)
    with pytest.raises(ConfigError, match=r"--train\.microbatch is 3; expected a divisor of the 4 images"):
        check_batch(32, 3, mesh)
