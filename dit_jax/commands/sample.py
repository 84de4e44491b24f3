"""Draw pictures from a trained run, or say what drawing them would need."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from dit_jax.commands import EXIT_BAD_OPTION
from dit_jax.compiler import keep_compiled_programs
from dit_jax.config import ConfigError, load, resolve
from dit_jax.generation import command
from dit_jax.generation.sampling import check_sampling
from dit_jax.models.create import build_model


def main(program: str, args: Sequence[str]) -> int:
    """Exit code 0: the files are written; 2: bad option; 4: does not fit the chips of --compile-for."""
    keep_compiled_programs()
    description = (
        f"Draw pictures from a trained run: {program} --workdir runs/digits --num-samples 64 --out grid.png"
    )
    options = tyro.cli(command.SampleArgs, args=args, prog=program, description=description)
    try:
        if options.compile_for:
            return _compile_for(program, options, options.compile_for)
        return command.main(options)
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_BAD_OPTION


def _compile_for(program: str, args: command.SampleArgs, topology: str) -> int:
    from dit_jax.planning.compile_for import compile_sampling
    from dit_jax.planning.report import print_report

    options = command.sampling_options(args)
    config = resolve(load(args.config)) if args.config else command.load_run(args.workdir).config
    model = build_model(config)
    check_sampling(model, config, options, model.condition.in_turn(1))
    return print_report(program, lambda: compile_sampling(config, options, args.batch_size, topology))
