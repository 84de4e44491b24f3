"""Bytes that a layer of DiT moves on an H100 with either norm kernel, or with and without 8-bit products, counted in
the program compiled for one.

    python benchmarks/gpu_bytes.py --out runs/gpu_bytes.json
    python benchmarks/gpu_bytes.py --compare quantization --out runs/gpu_bytes_float8.json

Needs no GPU, only its compiler: the packages jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12, which
are part of jax[cuda12]. Every operation counts with what it reads and writes once; what caches keep is not known.
Attention is einsum, which both programs have alike: a program with cuDNN's can only be compiled beside a GPU.

Letters: B batch, N tokens, D width, L layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from typing import Any

import harness
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from dit_jax.models.create import build_model
from dit_jax.planning.hlo import Instruction, Module, executions, parse, shape_bytes, unknown_loops

# No product is tried out on a GPU; bias and GELU join cuBLASLt's products, as a tuned program has it.
FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false --xla_gpu_enable_cublaslt=true"
COMPARED = {"norm_kernel": ("xla", "pallas"), "quantization": ("none", "fp8")}
FLOAT8_PRODUCT = 'custom_call_target="__cublas$lt$matmul$f8"'
BANDWIDTH = 3.35e12  # bytes/s of an H100's memory (NVIDIA's datasheet, SXM)
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional")


def moved_bytes(module: Module) -> int:
    """Bytes that all operations of one run read and write; ValueError where nobody knows how often a loop runs."""
    if loops := unknown_loops(module):
        raise ValueError(f"the program does not say how often {', '.join(loops)} runs")
    total = 0
    for name, times in executions(module).items():
        lines = module.computations.get(name, [])
        shapes = {line.name: line.shape for line in lines}
        for line in lines:
            if line.opcode in FREE:
                continue
            inside = re.search(r"\bcalls=%?([\w.\-]+)", line.text) if line.opcode == "fusion" else None
            if inside:
                total += times * _fusion_bytes(module.computations[inside[1]])
            else:
                read = sum(shape_bytes(shapes[operand]) for operand in _operands(line) if operand in shapes)
                total += times * (read + shape_bytes(line.shape))
    return total


def _operands(line: Instruction) -> list[str]:
    """Names of an instruction's operands: those before the parenthesis that closes their list."""
    depth = 1
    for end, letter in enumerate(line.text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return re.findall(r"%([\w.\-]+)", line.text[:end])
    raise ValueError(f"the operands of {line.name} have no closing parenthesis")


def _fusion_bytes(lines: list[Instruction]) -> int:
    """What a fusion reads and writes: of an array that it only cuts a slice from or puts one into, the slice."""
    by_name = {line.name: line for line in lines}

    def origin(name: str) -> Instruction:
        line = by_name[name]
        return origin(_operands(line)[0]) if line.opcode == "bitcast" else line

    def read(parameter: Instruction) -> int:
        users = [
            line for line in lines
            if line.opcode != "bitcast" and parameter in [origin(operand) for operand in _operands(line)]
        ]  # fmt: skip
        first = all(origin(_operands(user)[0]) is parameter for user in users)
        if users and first and all(user.opcode == "dynamic-slice" for user in users):
            return sum(shape_bytes(user.shape) for user in users)
        if users and first and all(user.opcode == "dynamic-update-slice" for user in users):
            return 0
        return shape_bytes(parameter.shape)

    def written(name: str) -> int:
        line = origin(name)
        if line.opcode == "dynamic-update-slice":
            return shape_bytes(by_name[_operands(line)[1]].shape)
        return shape_bytes(line.shape)

    root = next(line for line in lines if line.is_root)
    results = _operands(root) if root.opcode == "tuple" else [root.name]
    return sum(read(line) for line in lines if line.opcode == "parameter") + sum(map(written, results))


def compiled(config: Any, work: str, device: Any) -> str:
    """The optimized HLO of a forward pass ("sample") or of the parameters' gradient ("train")."""
    model, m, b = build_model(config), config.model, config.train.batch_size

    def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    x, y = struct((b, *m.input_size, m.in_channels), jnp.float32), struct((b,), jnp.int32)
    fresh = jax.eval_shape(model.init, jax.random.key(0), x, y, y)["params"]
    params = jax.tree.map(lambda leaf: struct(leaf.shape, leaf.dtype), fresh)

    def forward(p: Any, x: jax.Array, t: jax.Array, y: jax.Array) -> Any:
        return model.apply({"params": p}, x, t, y)

    gradient = jax.grad(lambda *inputs: jnp.mean(jnp.square(forward(*inputs))))
    # Later versions of JAX ask what the GPU is when they lower a kernel.
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        lowered = jax.jit(gradient if work == "train" else forward).lower(params, x, y, y)
    return lowered.compile().as_text()


def h100() -> Any:
    """The device to compile for; ends the script where its compiler is not installed."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
    jax.config.update("jax_platforms", "cpu")
    try:
        (device,) = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices
    except Exception as error:  # of several types
        sys.exit(f"the compiler for CUDA is expected, from pip install jax[cuda12]; found: {error}")
    return device


def options() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0])
    harness.add_model_options(parser, "DiT-XL/2", 64)
    parser.add_argument("--compare", default="norm_kernel", choices=sorted(COMPARED), help="option compared")
    parser.set_defaults(depth=8, dtype="bfloat16", attention="einsum")
    return parser.parse_args()


def main() -> None:
    args, device = options(), h100()
    config = harness.make_config(args)
    m = config.model
    tokens = (m.input_size[0] // m.patch_size) * (m.input_size[1] // m.patch_size)
    unit = args.batch_size * tokens * m.hidden_size * 2  # one array (B, N, D) in bfloat16
    rows = []
    before, after = COMPARED[args.compare]
    for work, remat in (("train", "dots_attention"), ("train", "none"), ("sample", "none")):
        if work == "sample" and args.compare == "quantization":  # which is for training
            continue
        for unroll in (False, True):
            moved, products = {}, {}
            for choice in COMPARED[args.compare]:
                compute = dataclasses.replace(
                    config.compute, remat=remat, unroll=unroll, **{args.compare: choice}
                )
                program = compiled(dataclasses.replace(config, compute=compute), work, device)
                moved[choice], products[choice] = moved_bytes(parse(program)), program.count(FLOAT8_PRODUCT)
            saved = (moved[before] - moved[after]) / m.depth
            rows.append({
                "work": work, "remat": remat, "unroll": unroll, "bytes": moved, "float8_products": products,
                "arrays_saved_a_layer": saved / unit,
                "ms_saved_a_layer_of_256_images": saved * 256 / args.batch_size / BANDWIDTH * 1e3,
            })  # fmt: skip
            print(rows[-1], flush=True)
    harness.finish(args, {"rows": rows})


if __name__ == "__main__":
    main()
