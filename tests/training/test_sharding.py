"""Every layout of a run over 8 devices gives what one device gives, in less memory."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from dit_jax.config import Config, ConfigError, MeshConfig, ModelConfig, resolve
from dit_jax.planning.topology import topology_devices
from dit_jax.training.program import abstract_batch, abstract_state, build_program
from dit_jax.training.sharding import (
    MESH_AXES,
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


@pytest.mark.parametrize("preset", [pytest.param(p, marks=pytest.mark.slow) for p in PRESETS])
def test_eight_devices_agree_with_one_in_bfloat16(tiny, one_device_in_bfloat16, preset):
    """Gradients are added over the devices in float32: a sum in bfloat16 would be off by 3e-3 and more."""
    start, one_state, one_metrics = one_device_in_bfloat16
    state, metrics, _ = tiny.run(tiny.config(compute={"dtype": "bfloat16"}, mesh=MESHES[preset]), 8, 1, start)
    np.testing.assert_allclose(metrics[0]["loss"], one_metrics[0]["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["grad_norm"], one_metrics[0]["grad_norm"], rtol=1e-4)
    found, expected = (s.opt_state[1][0].mu for s in (state, one_state))  # 0.1 x the clipped gradient
    assert tiny.relative_difference(found, expected) < 1e-3


@pytest.mark.slow
def test_a_tpus_attention_agrees_with_one_device_where_heads_are_shared_out(tiny):
    """Four heads over fsdp 4: their kernels' gradients are added up by heads."""
    options = {"model": {"num_heads": 4}, "compute": {"attention": "tokens_last"}}
    config = tiny.config(**options)
    start = jax.device_get(tiny.run(config, 1, 2)[0])  # by then no kernel's gradient is zero
    one_state, one_metrics, _ = tiny.run(config, 1, 1, start)
    state, metrics, _ = tiny.run(tiny.config(**options, mesh=MESHES["fsdp"]), 8, 1, start)
    np.testing.assert_allclose(metrics[0]["grad_norm"], one_metrics[0]["grad_norm"], rtol=1e-5)
    found, expected = (s.opt_state[1][0].mu for s in (state, one_state))
    assert tiny.relative_difference(found, expected) < 1e-4


def test_adaln_kernels_are_split_along_their_outputs_and_gathered_nowhere(tiny):
    config = tiny.config(mesh=MESHES["fsdp"])
    mesh = make_mesh(config.mesh)
    program = build_program(config, mesh, scaling_factor=1.0, shift_factor=0.0)
    kernel = program.state.params["adaln"]["kernel"]  # (D, L, 6, D)
    assert kernel.sharding.spec == P(None, None, None, ("fsdp",))
    text = program.step.lower(program.state, abstract_batch(config, mesh)).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    largest = max(np.prod([int(n) for n in shape.split(",") if n]) for shape in gathered)
    assert largest < kernel.size / 2, gathered


@pytest.fixture(scope="module")
def one_device_in_bfloat16(tiny):
    """(a state whose last layers are not zero, the state after one step on one device, that step's metrics)."""
    config = tiny.config(compute={"dtype": "bfloat16"})
    state, _, _ = tiny.run(config, 1, 3)
    start = jax.device_get(state)
    return start, *tiny.run(config, 1, 1, start)[:2]


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
    with pytest.raises(
        ConfigError, match=r"--mesh\.fsdp is 4; expected 1, because --mesh\.preset replicated"
    ):
        mesh_shape(MeshConfig(preset="replicated", fsdp=4), 8)


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (
            MeshConfig(preset="fsdp", data=3),
            8,
            r"--mesh\.preset fsdp --mesh\.data 3 means data 3 x fsdp \(the rest\) x tensor 1; .* 8 devices",
        ),
        (
            MeshConfig(preset="fsdp_tensor"),
            1,
            r"--mesh\.preset fsdp_tensor means data \(the rest\) x fsdp 1 x tensor 2; .* 1 devices",
        ),
        (MeshConfig(preset="fsdp_tensor", tensor=16), 8, r"--mesh\.tensor 16 means .* fsdp 1 x tensor 16"),
    ],
)
def test_errors_of_a_mesh_name_what_was_asked_for(config, devices, message):
    with pytest.raises(ConfigError, match=message):
        mesh_shape(config, devices)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """As jax shows a device of `platform` in a slice (of TPUs) or on a node (of GPUs)."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "fake"
    process_index: int = 0


def nodes(*sizes, order=None):
    """Devices of nodes with that many GPUs, one process each; `order` is the node of each device in turn."""
    order = [node for node, size in enumerate(sizes) for _ in range(size)] if order is None else order
    return [FakeDevice(i, node, process_index=i) for i, node in enumerate(order)]


@pytest.mark.parametrize(
    ("devices", "config", "shape"),
    [
        (nodes(8, 8), MeshConfig(preset="fsdp"), (2, 8, 1)),
        (nodes(4, 4, 4, 4), MeshConfig(preset="fsdp"), (4, 4, 1)),
        (nodes(8, 8), MeshConfig(preset="fsdp_tensor"), (2, 4, 2)),
        (nodes(16), MeshConfig(preset="fsdp"), (1, 16, 1)),
        (nodes(8, 8), MeshConfig(preset="fsdp", fsdp=16), (1, 16, 1)),  # asked for
        (nodes(8, 4), MeshConfig(preset="fsdp"), (3, 4, 1)),
    ],
)
def test_by_default_parameters_are_shared_inside_a_node_of_gpus(devices, config, shape):
    grid = make_mesh(config, devices).devices
    assert grid.shape == shape
    if config.fsdp is None:
        assert all(len({device.slice_index for device in row.flat}) == 1 for row in grid)


def test_groups_stay_inside_nodes_whose_processes_alternate():
    grid = make_mesh(MeshConfig(preset="fsdp"), nodes(order=[0, 1] * 8)).devices
    assert [{device.slice_index for device in row.flat} for row in grid] == [{0}, {1}]


def test_two_slices_of_tpus_are_joined_by_data_alone():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install libtpu (Linux, x86-64)")
    from jax.experimental import topologies

    topology_devices("v5e:4x4")  # tells the compiler to look for no TPU
    devices = topologies.get_topology_desc("v5e:4x4", "tpu", num_slices=2).devices
    for config, shape in (
        (MeshConfig(), (32, 1, 1)),
        (MeshConfig(preset="zero1"), (2, 16, 1)),
        (MeshConfig(preset="fsdp"), (2, 16, 1)),
        (MeshConfig(preset="fsdp", fsdp=8), (4, 8, 1)),
        (MeshConfig(preset="fsdp_tensor", fsdp=4, tensor=4), (2, 4, 4)),
    ):
        grid = make_mesh(config, devices).devices
        assert grid.shape == shape
        assert [d.slice_index for d in grid.flat] == [0] * 16 + [1] * 16
    message = (
        r"--mesh\.preset fsdp --mesh\.data 1 means fsdp 32 x tensor 1 inside a slice of TPUs; expected a divisor "
        r"of the devices of each of the 2 slices \(16\)"
    )
    with pytest.raises(ConfigError, match=message):
        make_mesh(MeshConfig(preset="fsdp", data=1), devices)
    with pytest.raises(ConfigError, match=r"2 slices \(12 and 16\)"):
        make_mesh(MeshConfig(preset="fsdp", data=1, fsdp=28), devices[:28])


@pytest.mark.parametrize(
    ("devices", "shape", "parts"),
    [(64, (64, 1, 1), 64), (96, (3, 32, 1), 96), (256, (2, 128, 1), 256), (160, (5, 32, 1), 32)],
)
def test_zero1_splits_a_large_model_over_any_number_of_devices(devices, shape, parts):
    """Every large leaf of XL is split at least `parts` ways, or as far as its table of labels allows."""
    assert mesh_shape(MeshConfig(preset="zero1"), devices) == shape
    model = ModelConfig(name="DiT-XL/2")
    config = resolve(Config(model=model, mesh=MeshConfig(preset="zero1")))
    for given, least in ((shape, parts), ((devices, 1, 1), 1)):
        state = abstract_state(config, AbstractMesh(given, MESH_AXES))
        for path, leaf in jax.tree_util.tree_leaves_with_path((state.opt_state, state.ema)):
            held = np.prod(leaf.sharding.shard_shape(leaf.shape))
            if leaf.size > 2e6:
                assert leaf.size / held >= least, jax.tree_util.keystr(path)
    assert state.params["blocks"]["attn"]["qkv"]["kernel"].sharding.spec == P()


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
    with pytest.raises(ConfigError, match=r"--mesh\.tensor 4; expected a divisor of --model\.num-heads 2"):
        tiny.run(tiny.config(mesh={"preset": "fsdp_tensor", "tensor": 4}), 8, 1)


def test_batch_must_divide():
    mesh = make_mesh(MeshConfig(preset="fsdp", data=2))
    assert check_batch(32, 0, mesh) == 1
    assert check_batch(32, 2, mesh) == 2
    with pytest.raises(ConfigError, match=r"--train\.batch-size is 12; expected a multiple of the 8 devices"):
        check_batch(12, 0, mesh)
    with pytest.raises(ConfigError, match=r"--train\.microbatch is 3; expected a divisor of the 4 images"):
        check_batch(32, 3, mesh)
