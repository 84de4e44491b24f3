"""What crosses from slice to slice: read from small programs by hand, and of a step on virtual devices."""

import jax
import pytest

from dit_jax.planning import hlo
from dit_jax.planning.crossing import crossings
from dit_jax.planning.timeline import device_groups
from dit_jax.training.program import abstract_batch, build_program
from dit_jax.training.sharding import bytes_per_device, make_mesh

SLICES = [0, 0, 0, 0, 1, 1, 1, 1]
HEAD = "HloModule step, is_scheduled=true, num_partitions=8\n"
RUNTIME = (
    'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}'
)
# As two compilers write them: a GPU's or CPU's names the devices, a TPU's has each slice by itself.
NAMED = f"""{HEAD}
ENTRY %main (p: f32[100]) -> f32[100] {{
  %p = f32[100]{{0}} parameter(0)
  %inside = f32[100]{{0}} all-reduce(%p), replica_groups=mesh['a'=2,'b'=4] {{'b'}}, to_apply=%add
  %across = f32[25]{{0}} all-reduce(%p), replica_groups={{{{0,4}},{{1,5}},{{2,6}},{{3,7}}}}, to_apply=%add
  ROOT %all = f32[10]{{0}} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
}}
"""
OF_RUNTIME = f"""{HEAD}
%body (q: f32[25]) -> f32[25] {{
  %q = f32[25]{{0}} parameter(0)
  %within = f32[25]{{0}} all-reduce(%q), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%add
  %sent = (f32[25]{{0}}, u32[], token[]) send(%q, %token), channel_id=5, {RUNTIME}
  %got = (f32[25]{{0}}, u32[], token[]) recv(%token), channel_id=4, {RUNTIME}
  ROOT %end = token[] send-done(%sent), channel_id=5, {RUNTIME}
}}

ENTRY %main (p: f32[25]) -> f32[25] {{
  %p = f32[25]{{0}} parameter(0)
  %else = (f32[9]{{0}}, u32[], token[]) send(%p, %token), is_host_transfer=true
  ROOT %loop = f32[25]{{0}} while(%p), condition=%c, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
}}
"""


def test_collectives_whose_groups_span_slices_cross():
    (found,) = crossings(hlo.parse(NAMED), SLICES)
    assert (found.kind, found.count, found.bytes) == ("all-reduce", 2, 4 * (25 + 10))
    assert found.wire_bytes == 100 * 2 / 2 + 40 * 2 * 7 / 8
    assert crossings(hlo.parse(NAMED), [0] * 8) == []


@pytest.mark.parametrize(("slices", "share"), [(2, 1.0), (4, 1.5)])
def test_what_a_tpus_program_gives_its_runtime_crosses(slices, share):
    slice_of = [device // 8 for device in range(8 * slices)]
    (found,) = crossings(hlo.parse(OF_RUNTIME), slice_of)
    assert (found.kind, found.count, found.bytes) == ("all-reduce", 3, 300)
    assert found.wire_bytes == 300 * share


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{{0},{1}}", [[0], [1]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ],
)
def test_the_devices_of_every_group(groups, devices):
    assert device_groups(f"channel_id=1, replica_groups={groups}, to_apply=%add", 4) == devices


@pytest.mark.slow
def test_gradients_are_added_inside_a_slice_first(tiny):
    """Of two slices of four devices, each sends its fourth of every kernel's gradient, and the whole of vectors."""
    config = tiny.config(mesh={"preset": "fsdp", "data": 2, "fsdp": 4})
    mesh = make_mesh(config.mesh)
    assert [device.id for device in mesh.devices.flat] == [device.id for device in jax.devices()]
    program = build_program(config, mesh, scaling_factor=1.0, shift_factor=0.0)
    step = program.step.lower(program.state, abstract_batch(config, mesh)).compile()
    params = program.state.params
    part = bytes_per_device(params, jax.tree.map(lambda leaf: leaf.sharding, params))
    assert part < sum(leaf.size * 4 for leaf in jax.tree.leaves(params)) / 4 * 1.3
    sent = {found.kind: found.bytes for found in crossings(hlo.parse(step.as_text()), SLICES)}
    assert part <= sent["all-reduce"] < 1.1 * part
    assert sum(sent.values()) < 1.1 * sent["all-reduce"]
