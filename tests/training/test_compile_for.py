"""Training steps compiled for TPUs that are not here, and the reading of the compiled programs."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from dit_jax.config import ConfigError
from dit_jax.generation.sampling import SamplingOptions
from dit_jax.training import hlo, timeline
from dit_jax.training.compile_for import (
    compile_sampling,
    compile_training,
    describe,
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
HloModule step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[16])) -> (s32[], f32[16]) {
  %carry = (s32[], f32[16]{0}) parameter(0)
  %count = s32[] get-tuple-element(%carry), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%count, %one)
  %x = f32[16]{0} get-tuple-element(%carry), index=1
  %reduced = f32[16]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %work = f32[16]{0} fusion(%reduced), calls=%add, backend_config={"estimated_cycles":"100"}
  ROOT %both = (s32[], f32[16]{0}) tuple(%next, /*index=1*/%work)
}

%condition (carry: (s32[], f32[16])) -> pred[] {
  %carry.1 = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry.1), index=0
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  %zero = s32[] constant(0)
  %from = s32[] copy(%zero)
  %gather-start = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %gather-done = bf16[32]{0} all-gather-done(%gather-start)
  %begin = (s32[], f32[16]{0}) tuple(%from, %p)
  %loop = (s32[], f32[16]{0}) while(%begin), condition=%condition, body=%body
  ROOT %out = f32[16]{0} fusion(%loop), calls=%add, backend_config={"estimated_cycles":"7"}
}
"""


def test_loops_collectives_and_cycles_are_read_from_the_program():
    module = hlo.parse(MODULE)
    assert module.entry == "main" and module.devices == 8
    assert hlo.executions(module) == {"main": 1, "body": 5}
    gather, reduce = timeline.collectives(module, 1.0, 1.0)
    assert (gather.kind, gather.count, gather.bytes, gather.wire_bytes) == ("all-gather", 1, 64, 64 * 3 / 4)
    assert (reduce.kind, reduce.count, reduce.bytes) == ("all-reduce", 5, 5 * 64)
    assert reduce.wire_bytes == 5 * 64 * 2 * 3 / 4
    for row in (gather, reduce):  # a start next to its end hides as little as none
        assert (row.asynchronous, row.exposed_bytes) == (0, row.wire_bytes)
    assert [(o.name, o.times, o.cycles) for o in hlo.operations(module, 1.0)] == [
        ("work", 5, 500), ("out", 1, 7),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "times"),
    [
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}', 3),
        ("%zero = s32[] constant(0)", "%zero = s32[] constant(2)", 3),
        ("%one = s32[] constant(1)", "%one = s32[] constant(2)", 3),
        ("%bound = s32[] constant(5)", "%bound = s32[] constant(0)", 0),
        ("%zero = s32[] constant(0)", "%zero = s32[] fusion(%p), calls=%add", None),
        ("add(%count, %one)", "add(%count, %count)", None),
        ("direction=LT", "direction=NE", None),
        ("%bound = s32[] constant(5)", "%bound = s32[] get-tuple-element(%carry.1), index=0", None),
    ],
)
def test_trip_counts_are_known_or_said_to_be_unknown(before, after, times):
    assert before in MODULE
    module = hlo.parse(MODULE.replace(before, after))
    assert hlo.executions(module)["body"] == (1 if times is None else times)
    assert hlo.unknown_loops(module) == (["loop"] if times is None else [])


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")


PRELUDE = """\
HloModule step, is_scheduled=true, num_partitions=2

%inner (q: f32[50]) -> f32[100] {
  %q = f32[50]{0} parameter(0)
  ROOT %wrapped = f32[100]{0} all-gather(%q), channel_id=9, replica_groups={{0,1}}, dimensions={0}
}

%begin (q.1: f32[50]) -> (f32[50], f32[100]) {
  %q.1 = f32[50]{0} parameter(0)
  %all-gather.1 = f32[100]{0} all-gather(%q.1), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %mark = (f32[50], f32[100]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle (q.2: f32[50]) -> f32[100] {
  %q.2 = f32[50]{0} parameter(0)
  %all-gather.2 = f32[100]{0} all-gather(%q.2), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %product = f32[100]{0} multiply(%all-gather.2, %all-gather.2)
}

%finish (q.3: f32[50]) -> f32[100] {
  %q.3 = f32[50]{0} parameter(0)
  %all-gather.3 = f32[100]{0} all-gather(%q.3), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %mark.1 = f32[100]{0} custom-call(%q.3, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (q.4: f32[100]) -> f32[50] {
  %q.4 = f32[100]{0} parameter(0)
  %sum = f32[100]{0} all-reduce(%q.4), channel_id=3, replica_groups={{0,1}}, to_apply=%add
  ROOT %part = f32[50]{0} dynamic-slice(%sum), dynamic_slice_sizes={50}
}
"""
GATHER_START = "%s = (f32[50]{0}, f32[100]{0}) all-gather-start(%p), channel_id=1, replica_groups={}"
GATHER_DONE = "%d = f32[100]{0} all-gather-done(%s)"
REDUCE = "%r = f32[25]{0} all-reduce(%p), channel_id=2, replica_groups={{0,1}}, to_apply=%add"


def cycles(number, name="w"):
    return f'%{name} = f32[50]{{0}} fusion(%p), calls=%none, backend_config={{"estimated_cycles":"{number}"}}'


# The gathers have 400 bytes of which each of two devices sends 200; the all-reduce sends its 100. A byte takes two
# cycles. Of each kind: executions, those with computation meanwhile, bytes that are waited for.
SCHEDULES = {
    "nothing between": ([GATHER_START, GATHER_DONE, cycles(900)], {"all-gather": (1, 0, 200)}),
    "too little between": ([GATHER_START, cycles(100), GATHER_DONE], {"all-gather": (1, 1, 150)}),
    "enough between": ([GATHER_START, cycles(401), GATHER_DONE], {"all-gather": (1, 1, 0)}),
    "another end between": (
        [GATHER_START, "%c-done = f32[50] copy-done(%c)", GATHER_DONE], {"all-gather": (1, 0, 200)},
    ),
    "one behind the other": (  # both are on the network, the second after the first: 500 cycles, of which 300 hide
        [GATHER_START, GATHER_START.replace("%s", "%t").replace("[50]", "[25]").replace("[100]", "[50]"),
         cycles(300), GATHER_DONE, GATHER_DONE.replace("%d", "%e").replace("%s", "%t")],
        {"all-gather": (2, 2, 150)},
    ),
    "a wait for another hides nothing": ([GATHER_START, REDUCE, GATHER_DONE],
                                         {"all-gather": (1, 0, 200), "all-reduce": (1, 0, 100)}),
    "no end": ([GATHER_START, cycles(100)], {"all-gather": (1, 1, 150)}),
    "a wrapped one": (
        ["%s = ((f32[50]), f32[100], u32[]) async-start(%p), calls=%inner", cycles(100),
         "%u = ((f32[50]), f32[100], u32[]) async-update(%s)", cycles(100, "w2"), "%d = f32[100] async-done(%u)"],
        {"all-gather": (1, 1, 100)},
    ),
    "spread over fusions": (
        [cycles(9).replace("%none", "%begin"), cycles(100, "w2").replace("%none", "%middle"), cycles(50, "w3"),
         cycles(9, "w4").replace("%none", "%finish"), cycles(999, "w5")],
        {"all-gather": (1, 1, 125)},
    ),
    "reduced and scattered in one fusion": (
        [cycles(999).replace("%none", "%all-reduce-scatter")], {"reduce-scatter": (1, 0, 200)},
    ),
    "permuted": (
        ["%s = (f32[25], f32[25], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}",
         cycles(50), "%d = f32[25] collective-permute-done(%s)"], {"collective-permute": (1, 1, 75)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "expected"), SCHEDULES.values(), ids=SCHEDULES)
def test_what_a_chip_waits_for_follows_from_the_schedule(lines, expected):
    body = "".join(f"  {line}\n" for line in lines)
    module = hlo.parse(
        f"{PRELUDE}\nENTRY %main (p: f32[50]) -> f32[50] {{\n  %p = f32[50] parameter(0)\n{body}}}\n"
    )
    rows = timeline.collectives(module, 1.0, 2.0)
    assert {row.kind: (row.count, row.asynchronous, row.exposed_bytes) for row in rows} == expected


@pytest.mark.parametrize("times", [1, 2, 6])
def test_a_loop_hides_what_is_on_its_way_while_it_runs(times):
    """1000 cycles on the network; a turn computes 100 and has 100 of its own to send, behind what is on its way."""
    loop = MODULE.replace("constant(5)", f"constant({times})").replace(
        "f32[16]{0} all-reduce", "f32[25]{0} all-reduce"
    )
    loop = loop.replace("{{0,1,2,3}}", "{{0,1}}").replace("[2,4]<=[8]", "[4,2]<=[8]")
    start, done = (
        next(x for x in loop.splitlines(True) if f"gather-{part} =" in x) for part in ("start", "done")
    )
    text = loop.replace(start, start.replace("8]{0}, bf16[32]", "1000]{0}, bf16[2000]")).replace(done, "")
    text = text.replace("  ROOT %out", done + "  ROOT %out")
    gather, reduce = timeline.collectives(hlo.parse(text), 1.0, 0.5)
    assert (gather.wire_bytes, reduce.wire_bytes) == (2000, 100 * times)
    assert (gather.exposed_bytes + reduce.exposed_bytes) * 0.5 == 1000 + 50 * times


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
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1':(2)4}", 8),
        ("replica_groups={}, channel_id=1", 16),
        ("channel_id=1", 16),
    ],
)
def test_devices_of_a_collective(groups, size):
    assert timeline.group_size(groups, 16) == size


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
    assert report.images_per_chip * 8 == 16 and "batch           2 images per chip" in describe(report)
    assert report.unknown_loops == []
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
    five, ten = (
        product_cycles(lambda x, w, t=t: jax.lax.fori_loop(0, t, lambda _, x: x @ w, x))
        for t in (times, 2 * times)
    )
    assert ten == 2 * five and five % times == 0  # one product, repeated
    assert 0.75 < times * once / five < 1.25  # it is compiled anew, for other buffers


@pytest.mark.slow
def test_a_compiled_gather_is_hidden_by_as_much_as_stands_between(compiler):
    """A parameter is gathered while products that do not need it run: the compiler spreads it over fusions."""
    chip, devices = topology_devices("v5e:2x4")
    mesh = jax.sharding.Mesh(np.array(devices), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("x",)))
    n = 2048
    w, x = (jax.ShapeDtypeStruct((n, n), jnp.bfloat16, sharding=s) for s in (split, whole))

    def compiled_gather(function):
        with no_compilation_cache():
            module = hlo.parse(jax.jit(function, out_shardings=whole).lower(w, x).compile().as_text())

        def waited_for(cycles_per_byte):
            (gather,) = timeline.collectives(module, chip.flops_per_cycle, cycles_per_byte)
            assert (gather.count, gather.bytes, gather.wire_bytes) == (1, 2 * n * n, sent)
            return gather.exposed_bytes * cycles_per_byte

        sent = 2 * n * n * 7 / 8
        return sent, waited_for, sum(o.cycles for o in hlo.operations(module, chip.flops_per_cycle))

    def gathered(w):
        return jax.lax.with_sharding_constraint(w, whole)

    sent, waited_for, _ = compiled_gather(lambda w, x: gathered(w))
    assert waited_for(1.0) == sent
    sent, waited_for, spent = compiled_gather(lambda w, x: (x @ x @ x) @ gathered(w))
    assert waited_for(chip.clock / chip.ici) == 0
    # On a network too slow to hide all of it, what stands between is hidden: one product at least, not all three.
    between = 10 * sent - waited_for(10.0)
    assert spent / 4 < between < spent * 3 / 4
    assert waited_for(20.0) == 20 * sent - between


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
