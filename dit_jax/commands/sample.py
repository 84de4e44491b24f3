"""Draw pictures from a trained run, or say what drawing them would need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dit_jax.commands.drawing import run_drawing
from dit_jax.config import ConfigError, load, resolve
from dit_jax.generation import command
from dit_jax.generation.sampling import check_sampling
from dit_jax.models.create import build_model


def main(program: str, args: Sequence[str]) -> int:
    """Exit code 0: the files are written; 1: failed; 2: bad option; 4: does not fit the chips of --compile-for. When
    one process of several fails, all end with its code."""

    def do(options: command.SampleArgs, join: Callable[[], None]) -> int:
        if options.compile_for:
            return _compile_for(program, options, options.compile_for)
        join()
        return command.main(options)

    example = f"{program} --workdir runs/digits --num-samples 64 --out grid.png"
    return run_drawing(program, args, command.SampleArgs, f"Draw pictures from a trained run: {example}", do)


def _compile_for(program: str, args: command.SampleArgs, topology: str) -> int:
    from dit_jax.planning.compile_for import compile_sampling
    from dit_jax.planning.report import print_report

    options = command.sampling_options(args)
    if args.source is not None:
        raise ConfigError(f"--from is {args.source} with --compile-for; expected --config or --workdir")
    if args.size is not None:
        raise ConfigError(
            f"--size is {args.size} with --compile-for; expected none, or --model.input-size in a recipe"
        )
    config = resolve(load(args.config)) if args.config else command.load_run(args.workdir).config
    model = build_model(config)
    check_sampling(model, config, options, model.condition.in_turn(1))
    return print_report(program, lambda: compile_sampling(config, options, args.batch_size, topology))
