"""Training steps compiled for TPUs that are not here, and the reading of the compiled programs."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from dit_jax.config import ConfigError
from dit_jax.generation.sampling import SamplingOptions
from dit_jax.training import hlo
from dit_jax.training.compile_for import (
    compile_sampling,
    compile_training,
    no_compilation_cache,
    print_report,
    topology_devices,
)
from dit_jax.training.launch import EXIT_DOES_NOT_FIT
from dit_jax.training.program import build_program
from dit_jax.training.sharding import make_mesh

PRESETS = ("replicated", "zero1", "fsdp", "fsdp_tensor")
TOPOLOGIES = ("v5e:2x4", "v6e:2x4")

MODULE = """\
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[16])) -> (s32[], f32[16]) {
  %carry = (s32[], f32[16]{0}) parameter(0)
  %x = f32[16]{0} get-tuple-element(%carry), index=1
  %reduced = f32[16]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %next = (s32[], f32[16]{0}) fusion(%reduced), calls=%add, backend_config={"estimated_cycles":"100"}
}

%condition (carry: (s32[], f32[16])) -> pred[] {
  %carry.1 = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry.1), index=0
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  %gather-start = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %loop = (s32[], f32[16]{0}) while(%p), condition=%condition, body=%body
  ROOT %out = f32[16]{0} fusion(%loop), calls=%add, backend_config={"estimated_cycles":"7"}
}
"""


def test_loops_collectives_and_cycles_are_read_from_the_program():
    module = hlo.parse(MODULE)
    assert module.entry == "main"
    assert hlo.executions(module) == {"main": 1, "body": 5}
    gather, reduce = hlo.collectives(module)
    assert (gather.kind, gather.count, gather.asynchronous, gather.bytes) == ("all-gather", 1, 1, 64)
    assert gather.wire_bytes == 64 * 3 / 4 and gather.exposed_bytes == 0
    assert (reduce.kind, reduce.count, reduce.asynchronous, reduce.bytes) == ("all-reduce", 5, 0, 5 * 64)
    assert reduce.wire_bytes == reduce.exposed_bytes == 5 * 64 * 2 * 3 / 4
    assert [(o.name, o.times, o.cycles) for o in hlo.operations(module, 1.0)] == [
        ("next", 5, 500), ("out", 1, 7),
    ]  # fmt: skip


def test_a_known_trip_count_is_taken_and_a_text_without_entry_refused():
    known = MODULE.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert hlo.executions(hlo.parse(known))["body"] == 3
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[2,3]{1,0}", 24), ("(bf16[4], s8[5])", 13), ("pred[]", 1), ("s4[3]", 2), ("token[]", 0)],
)
def test_bytes_of_shapes(shape, size):
    assert hlo.shape_bytes(shape) == size


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("channel_id=1", 1),
    ],
)
def test_devices_of_a_collective(groups, size):
    assert hlo.group_size(groups) == size


@pytest.fixture(scope="module")
def compiler():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install libtpu (Linux, x86-64)")


@pytest.fixture(scope="module")
def compiled(compiler, tiny):
    """(topology, preset) -> Report of a two-layer model's step; each is compiled once."""

    @functools.cache
    def report(topology, preset):
        model = {"hidden_size": 64, "dtype": "bfloat16", "remat": "dots_attention"}
        return compile_training(tiny.config(model=model, mesh={"preset": preset}), topology)

    return report


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_compiles_for_chips_that_are_not_here(compiled, topology, preset):
    report = compiled(topology, preset)
    assert 0 < report.total_bytes < report.chip.hbm_gib * 2**30
    assert report.cycles > 0 and 0 < report.mfu_with_collectives <= report.mfu < 1
    kinds = {c.kind for c in report.collectives}
    assert kinds & {"all-reduce", "reduce-scatter"}, kinds  # the gradients of all chips are added
    gathers = "all-gather" in kinds
    assert gathers == (preset != "replicated"), kinds  # parts of the state are put together where it is split


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["replicated", "fsdp"])
def test_the_update_is_one_pass_over_each_parameter(compiled, tiny, preset):
    """A single operation writes a parameter, its two moments and its average."""
    report = compiled("v5e:2x4", preset)
    shapes = [re.findall(r"f32\[[\d,]*\]", o.shape) for o in report.operations if o.opcode == "fusion"]
    updates = [of[0] for of in shapes if len(of) == 4 and len(set(of)) == 1]
    config = tiny.config(model={"hidden_size": 64}, mesh={"preset": preset})
    program = build_program(config, make_mesh(config.mesh), scaling_factor=1.0, shift_factor=0.0)
    parts = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(program.state.params)]
    assert Counter(updates) >= Counter(f"f32[{','.join(map(str, part))}]" for part in parts if len(part) > 1)


@pytest.mark.slow
def test_products_with_split_parameters_stay_whole(compiler, tiny):
    """A collective matmul would cut them into slivers and pass these around by collective permutes."""
    config = tiny.config(
        model={"hidden_size": 512, "mlp_ratio": 4.0, "dtype": "bfloat16", "input_size": (32, 32)},
        mesh={"preset": "fsdp"}, train={"batch_size": 64},
    )  # fmt: skip
    kinds = {c.kind: c.count for c in compile_training(config, "v5e:2x4").collectives}
    assert kinds["all-gather"] > 4 and kinds.get("collective-permute", 0) == 0, kinds


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_cycles_of_a_large_product_are_near_the_chips_peak_and_a_loop_repeats_them(compiler, topology):
    chip, devices = topology_devices(topology)
    n, times = 4096, 5
    square = jax.ShapeDtypeStruct((n, n), jnp.bfloat16, sharding=SingleDeviceSharding(devices[0]))

    def product_cycles(function):
        with no_compilation_cache():
            module = hlo.parse(jax.jit(function).lower(square, square).compile().as_text())
        return sum(o.cycles for o in hlo.operations(module, 1.0) if "dot_general" in o.source)

    once = product_cycles(lambda x, w: x @ w)
    assert 0.85 < 2 * n**3 / (once * chip.flops_per_cycle) <= 1
    loop = product_cycles(lambda x, w: jax.lax.fori_loop(0, times, lambda _, x: x @ w, x))
    assert loop == pytest.approx(times * once, rel=0.5)  # its product is compiled anew, for other buffers


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_splitting_the_state_saves_memory_of_each_part(compiled, topology):
    parts = {preset: compiled(topology, preset).arguments for preset in PRESETS}
    whole = parts["replicated"]
    for split in ("zero1", "fsdp"):  # over 8 chips; vectors stay whole
        assert parts[split]["optimizer"] < whole["optimizer"] / 6
        assert parts[split]["EMA"] < whole["EMA"] / 6
    assert parts["zero1"]["parameters"] == whole["parameters"]
    assert parts["fsdp"]["parameters"] < whole["parameters"] / 6
    memory = {preset: compiled(topology, preset).memory["arguments"] for preset in PRESETS}
    assert memory["fsdp"] < memory["zero1"] < memory["replicated"]  # and so says the compiler


@pytest.mark.slow
def test_a_sampling_loop_compiles(compiler, tiny):
    options = SamplingOptions(steps=4, cfg_scale=1.5)
    report = compile_sampling(tiny.config(model={"dtype": "bfloat16"}), options, 12, "v5e:2x4")
    assert report.images == 2  # 12 samples are filled up to 16, two on each of 8 chips
    assert any(o.times == 4 * 2 for o in report.operations)  # 4 steps of 2 layers, guided pairs in one batch
    assert 0 < report.mfu < 1 and 0 < report.total_bytes < report.chip.hbm_gib * 2**30


def refusal(config, capsys):
    assert print_report("train.py", lambda: compile_training(config, "v5e:2x4")) == EXIT_DOES_NOT_FIT
    return capsys.readouterr().err


def test_a_step_that_does_not_fit_ends_with_advice(compiler, tiny, capsys):
    error = refusal(tiny.config(model={"input_size": (64, 64)}, train={"batch_size": 2**16}), capsys)
    for part in ("train.py: does not fit: the program needs", "v5e chip", "--model.remat", "--mesh.preset fsdp",
                 "--train.microbatch 4096", "--model.dtype bfloat16"):  # fmt: skip
        assert part in error


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.97G of 15.75G hbm. Exceeded hbm capacity",
        "E1000: the total memory required for HLO temporaries (22.97G) exceeds available HBM (15.75G). HLO module",
    ],
)
def test_both_ways_in_which_the_compiler_says_so_are_read(compiler, tiny, capsys, monkeypatch, message):
    def compile_step(lowered):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_step)
    assert "needs 22.97G of the 15.75G" in refusal(tiny.config(), capsys)


@pytest.mark.parametrize("topology", ["v99:2x2", "v5e", "v5e:3x5x7"])
def test_an_unknown_topology_is_an_error_that_names_it(compiler, topology):
    with pytest.raises(ConfigError, match=rf"--compile-for is '{topology}'.* expected a TPU .*v5e:16x16"):
        topology_devices(topology)


def test_attention_of_a_gpu_is_refused(compiler, tiny):
    config = tiny.config(model={"attention": "cudnn"})
    with pytest.raises(ConfigError, match="attention is cudnn, a kernel for GPUs; expected auto"):
        compile_sampling(config, SamplingOptions(), 4, "v5e:2x2")
