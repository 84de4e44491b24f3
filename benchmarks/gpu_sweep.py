"""The whole sweep on one GPU, in one command: training steps and sampling of DiT, and the same work in PyTorch.

    python benchmarks/gpu_sweep.py --out runs/gpu_sweep                                  # everything: hours
    python benchmarks/gpu_sweep.py --out runs/gpu_sweep --stage train --budget 560    # one stage, in 10 minutes
    python benchmarks/gpu_sweep.py --out runs/gpu_sweep --docs docs/performance.md
    JAX_PLATFORMS=cpu python benchmarks/gpu_sweep.py --out runs/gpu_sweep --smoke        # tiny, a CPU is enough

Every variant is a process of its own, as XLA's flags hold for a whole process. Its result is DIR/NAME.json and its
output DIR/NAME.log; one that fails leaves DIR/NAME.failed, and the sweep goes on. What has either file is not run
again: the same command goes on where it stopped; remove the file to try once more. DIR/table.md is written after
every variant. Needs jax, flax, optax, orbax and torch (diffusers for the variants named so).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

HERE = pathlib.Path(__file__).parent
MARKERS = ("<!-- gpu_sweep: begin -->", "<!-- gpu_sweep: end -->")
LIMIT = 540.0  # seconds of one process; max-autotune and unrolled layers compile for minutes
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemoryError", "CUDA_ERROR_OUT_OF_MEMORY")
TOO_LONG, UNFINISHED = "took too long", "unfinished"
TINY = "--depth 2 --hidden-size 32 --num-heads 2 --latent-size 8 --rounds 1"
SMOKE = {"train_step.py": f"{TINY} --steps-per-round 1 --microbatch 0", "sample.py": f"{TINY} --steps 4"}
SMOKE_BATCH = 4
SMOKE_VARIANTS = (  # one of each kind; on a CPU the last fails, as one does that finds no memory
    "train-remat-dots_attention", "torch-plain", "sample-jax-50", "sample-torch-plain-50", "kernel-norm",
    "float8-b2-kept", "attention-cudnn",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One process: a script with its options, tried with smaller batches while memory runs out."""

    name: str
    stage: str
    script: str
    options: str
    batch_sizes: tuple[int, ...]
    work: str  # variants of the same work are compared with its fastest PyTorch variant
    flags: str = ""

    @property
    def peer(self) -> bool:
        return "--only peer" in self.options


def training(stage: str, name: str, options: str, model: str = "DiT-XL/2", **fields: Any) -> Variant:
    """A training step in bfloat16 with AdamW and EMA; 256x256 pixels unless `options` name another size."""
    work = f"{model.removeprefix('DiT-')}-{512 if '--latent-size 64' in options else 256}, training step"
    fields.setdefault("batch_sizes", (256, 192, 128, 64))
    options = f"--model {model} --dtype bfloat16 --steps-per-round 5 {options}"
    return Variant(f"{stage}-{name}", stage, "train_step.py", options, work=work, **fields)


def sampling(stage: str, name: str, steps: int, options: str, **fields: Any) -> Variant:
    """The guided sampling loop of XL/2 at 256x256 in bfloat16."""
    work = f"XL/2-256, {steps} DDIM steps, guided"
    options = f"--model DiT-XL/2 --dtype bfloat16 --steps {steps} --rounds 5 {options}"
    fields.setdefault("batch_sizes", (64, 32, 16))
    return Variant(f"{stage}-{name}-{steps}", stage, "sample.py", options, work=work, **fields)


# Each is tried alone, on top of the defaults. Reasons: docs/performance.md, "GPU".
FLAGS = {
    "cublas": "--xla_gpu_enable_triton_gemm=false",
    "cublaslt": "--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_cublaslt=true",
    "triton": "--xla_gpu_triton_gemm_any=true",
    "tiling": "--xla_gpu_exhaustive_tiling_search=true",
    "cudnn-fusion": "--xla_gpu_cudnn_gemm_fusion_level=2",
    "no-command-buffer": "--xla_gpu_enable_command_buffer=",
    "command-buffer-loops": "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,WHILE",
    "latency-hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "double-buffering": "--xla_gpu_enable_while_loop_double_buffering=true",
    "fusion-autotuner": "--xla_gpu_experimental_enable_fusion_autotuner=true",
}
BEST_KNOWN = "--remat dots_attention --attention auto"


def variants() -> Iterator[Variant]:
    """The sweep, the most important first."""
    for remat in ("dots_attention", "dots", "full", "none"):
        yield training("train", f"remat-{remat}", f"--remat {remat}")
    yield training("train", "microbatch-64", f"{BEST_KNOWN} --microbatch 64", batch_sizes=(256,))

    peer = "--only peer --peer torch"
    for precision, name in (("autocast", ""), ("master", "master-")):
        how = f"{peer} --peer-precision {precision} --peer-compile"
        yield training("torch", f"{name}plain", f"{how} none")
        for mode in ("default", "max-autotune"):
            yield training("torch", f"{name}compiled-{mode}", f"{how} {mode}")
    compiled = {
        name: f"--peer-precision {name} --peer-compile max-autotune" for name in ("autocast", "master")
    }
    yield training("torch", "diffusers-compiled", f"--only peer --peer diffusers {compiled['autocast']}")

    for steps in (250, 50):
        yield sampling("sample", "jax", steps, "--only jax --attention auto")
    yield sampling("sample", "unrolled", 50, "--only jax --attention auto --unroll")
    for steps in (250, 50):
        yield sampling("sample-torch", "plain", steps, f"{peer} --peer-compile none")
        yield sampling("sample-torch", "compiled-max-autotune", steps, f"{peer} --peer-compile max-autotune")
        yield sampling(
            "sample-torch", "diffusers-compiled", steps,
            "--only peer --peer diffusers --peer-compile max-autotune",
        )  # fmt: skip

    for kernel in ("cudnn", "xla", "einsum", "tokens_last"):
        yield training("attention", kernel, f"--remat dots_attention --attention {kernel}")
    fused = f"{BEST_KNOWN} --norm-kernel pallas"
    yield training("kernel", "norm", fused)
    yield training("kernel", "norm-unrolled", f"{fused} --unroll")
    yield training("kernel", "norm-cublaslt", fused, flags=FLAGS["cublaslt"])
    yield sampling("kernel", "norm", 50, "--only jax --attention auto --norm-kernel pallas")
    for remat in ("dots_attention", "none"):
        yield training("float8", f"xl2-remat-{remat}", f"--remat {remat} --quantization fp8")
    yield training("float8", "b2-kept", "--remat none --quantization fp8", model="DiT-B/2")
    yield training("unroll", "layers", f"{BEST_KNOWN} --unroll")
    for name, flags in FLAGS.items():
        yield training("flags", name, BEST_KNOWN, flags=flags)
    for name in ("cublaslt", "command-buffer-loops", "no-command-buffer"):
        yield sampling("sample-flags", name, 50, "--only jax --attention auto", flags=FLAGS[name])

    large = "--latent-size 64"
    sizes = (64, 48, 32, 16)
    yield training("xl512", "jax", f"{BEST_KNOWN} {large}", batch_sizes=sizes)
    for name, how in compiled.items():
        yield training("xl512", f"torch-{name}", f"{peer} {how} {large}", batch_sizes=sizes)
    for model in ("DiT-B/2", "DiT-L/2"):
        short = model[4].lower()
        yield training("family", f"{short}2-kept", "--remat none", model=model)
        yield training("family", f"{short}2-remat", BEST_KNOWN, model=model)
        for name, how in compiled.items():
            yield training("family", f"{short}2-torch-{name}", f"{peer} {how}", model=model)


# ---------------------------------------------------------------------------------------- running one


def command(variant: Variant, batch_size: int, out: pathlib.Path, tiny: bool) -> list[str]:
    """The variant's command line; of an option given twice the last holds."""
    words = [sys.executable, str(HERE / variant.script), *variant.options.split()]
    words += ["--batch-size", str(batch_size), *(SMOKE[variant.script].split() if tiny else ())]
    return [*words, "--out", str(out)]


def environment(variant: Variant, out: pathlib.Path) -> dict[str, str]:
    """The process's environment: flags, compiled programs kept beside the results, memory for who needs it."""
    new = dict(os.environ)
    new["XLA_FLAGS"] = f"{new.get('XLA_FLAGS', '')} {variant.flags}".strip()
    new["JAX_COMPILATION_CACHE_DIR"] = str(out.resolve() / "compiled")  # the plain path is shared by variants
    new["TORCHINDUCTOR_CACHE_DIR"] = str(out.resolve() / "compiled" / "torch")
    new["JAX_TRACEBACK_FILTERING"] = "off"  # so that the last line is the error
    if variant.peer:
        new["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # JAX only says what the device is
    else:
        new.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    return new


def run_process(words: list[str], env: dict[str, str], log: pathlib.Path, limit: float) -> str:
    """ "" where it succeeded, else why not in a line; its output goes to `log`."""
    with log.open("a") as sink:
        print(f"$ XLA_FLAGS='{env['XLA_FLAGS']}' {' '.join(words)}", file=sink, flush=True)
        start = sink.tell()
        process = subprocess.Popen(words, env=env, stdout=sink, stderr=sink, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:  # with the compilers that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status == 0:
        return ""
    if status is None:
        return TOO_LONG
    with log.open(errors="replace") as source:
        source.seek(start)
        text = source.read()
    if any(words in text for words in OUT_OF_MEMORY):
        return "out of memory"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else f"ended with code {status}")[:200]


def run_variant(variant: Variant, out: pathlib.Path, tiny: bool, end: float) -> str:
    """Run it with the largest batch that fits: "" or why it failed; UNFINISHED where `end` cut it off."""
    log, partial = out / f"{variant.name}.log", out / f"{variant.name}.partial"
    log.unlink(missing_ok=True)
    tried = []
    why = ""
    for size in (SMOKE_BATCH,) if tiny else variant.batch_sizes:
        tried.append(str(size))
        too_large = out / f"{variant.name}.{size}.oom"  # remembered, as reaching it may take minutes
        if too_large.exists():
            why = "out of memory"
            continue
        start = time.monotonic()
        limit = min(LIMIT, end - start)
        why = run_process(command(variant, size, partial, tiny), environment(variant, out), log, limit)
        if not why:
            partial.replace(out / f"{variant.name}.json")  # visible when whole
            return ""
        if why == TOO_LONG and limit < LIMIT:
            return UNFINISHED
        if why != "out of memory":
            break
        too_large.touch()
    why += f" (batch {', '.join(tried)})"
    (out / f"{variant.name}.failed").write_text(why + "\n")
    return why


# -------------------------------------------------------------------------------------------- results


def result_of(variant: Variant, out: pathlib.Path) -> dict[str, Any] | None:
    """What its process measured, None where it has not finished."""
    path = out / f"{variant.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def has_run(variant: Variant, out: pathlib.Path) -> bool:
    """Whether it has finished or failed."""
    return any((out / f"{variant.name}.{kind}").exists() for kind in ("json", "failed"))


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """The line of the one thing that was timed."""
    (line,) = result["results"].values()
    return line


def table(every: Sequence[Variant], out: pathlib.Path) -> str:
    """The markdown table of all that has run."""
    results = {v.name: r for v in every if (r := result_of(v, out)) is not None}
    peers: dict[str, float] = {}
    for v in every:
        if v.peer and v.name in results:
            peers[v.work] = max(peers.get(v.work, 0.0), figures(results[v.name])["images_per_s"])
    lines = []
    if results:
        place = next(iter(results.values()))["environment"]
        versions = ", ".join(f"{name} {number}" for name, number in place["versions"].items())
        lines = [f"{place['devices']} x {place['device']}; {versions}; Python {place['python']}.", ""]
    lines += [
        "| work | variant | batch | images/s | MFU | to the fastest PyTorch | error against plain float32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for v in every:
        failed = out / f"{v.name}.failed"
        if v.name in results:
            cells = result_cells(v, results[v.name], peers)
        elif failed.exists():
            cells = [f"failed: {failed.read_text().strip()}".replace("|", "/"), "", "", "", ""]
        else:
            continue
        flags = f", `{v.flags}`" if v.flags else ""
        lines.append("| " + " | ".join([v.work, f"{v.name}{flags}", *cells]) + " |")
    return "\n".join(lines) + "\n"


def result_cells(variant: Variant, result: dict[str, Any], peers: dict[str, float]) -> list[str]:
    """Batch, images/s, MFU, ratio to the fastest peer, largest error."""
    line = figures(result)
    fastest = peers.get(variant.work)
    errors = result["correctness"].values()
    return [
        str(result["options"]["batch_size"]),
        f"{line['images_per_s']:.1f}",
        f"{line['mfu']:.1%}" if "mfu" in line else "",
        f"{line['images_per_s'] / fastest:.2f}x" if fastest else "",
        f"{max(errors):.1e}" if errors else "",
    ]


def replace_table(page: pathlib.Path, text: str) -> None:
    """Put the table between the page's markers; SystemExit where it has none."""
    begin, found, rest = page.read_text().partition(MARKERS[0])
    _, found_end, after = rest.partition(MARKERS[1])
    if not found or not found_end:
        sys.exit(f"--docs is {page}, which lacks the lines {MARKERS[0]} and {MARKERS[1]}")
    page.write_text(f"{begin}{MARKERS[0]}\n{text}{MARKERS[1]}{after}")


# ------------------------------------------------------------------------------------------------ main


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    stages = list(dict.fromkeys(v.stage for v in variants()))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    parser.add_argument("--stage", nargs="+", choices=stages, help="only these (default: all)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these variants, as --list names them")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS",
                        help="stop then; the same command goes on")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and few variants, into DIR/smoke")
    parser.add_argument("--list", action="store_true", help="print the variants and end")
    parser.add_argument("--docs", type=pathlib.Path, help="page whose table is replaced")
    args = parser.parse_args()
    known = {v.name for v in variants()}
    unknown = set(args.only or ()) - known
    if args.smoke and args.docs:
        parser.error("--docs is given with --smoke; expected one of them, as tiny sizes are no figures")
    if unknown:
        parser.error(f"--only is {' '.join(sorted(unknown))}; expected names that --list prints")
    return args


def main() -> None:
    args = options()
    end = time.monotonic() + args.budget
    every = list(variants())
    if args.smoke:
        args.out /= "smoke"
        args.only = args.only or SMOKE_VARIANTS
    chosen = every
    if args.stage:
        chosen = [v for v in chosen if v.stage in args.stage]
    if args.only:
        chosen = [v for v in chosen if v.name in args.only]
    if args.list:
        print("\n".join(f"{v.name}: {v.script} {v.options} {v.flags}".rstrip() for v in chosen))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    left = [v for v in chosen if not has_run(v, args.out)]
    for v in (bar := tqdm(left, desc="variants", unit="variant")):
        bar.set_postfix_str(v.name)
        why = run_variant(v, args.out, args.smoke, end) if time.monotonic() < end else UNFINISHED
        if why == UNFINISHED:
            tqdm.write(f"{v.name}: the time is over; the same command goes on")
            break
        tqdm.write(f"{v.name}: {f'failed: {why}' if why else 'done'}")
        (args.out / "table.md").write_text(table(every, args.out))
    text = table(every, args.out)
    (args.out / "table.md").write_text(text)
    if args.docs:
        replace_table(args.docs, text)
    print(text)


if __name__ == "__main__":
    main()
