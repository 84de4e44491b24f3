"""Train a Diffusion Transformer, or say what training it would need."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from dit_jax import processes
from dit_jax.buckets import BucketError
from dit_jax.compiler import keep_compiled_programs
from dit_jax.config import ConfigError, parse_args
from dit_jax.training import launch


def main(program: str, args: Sequence[str]) -> int:
    """Exit code 0: finished; 1: failed; 2: bad option; 3: diverged; 4: does not fit the chips of --compile-for; 75:
    stopped by a signal, the same command goes on; 130: interrupted by Ctrl-C before the first step, or by a second
    one. When one process of several fails, all end with its code."""
    keep_compiled_programs()
    try:
        options, rest, launch_help = launch.parse_launch(args, program)
        config = parse_args(rest, more_help=launch_help, program=program)
        if options.compile_for:
            from dit_jax.planning.compile_for import compile_training
            from dit_jax.planning.report import print_report

            return print_report(
                program, lambda: compile_training(config, options.compile_for, options.slices)
            )
        launch.initialize(options)
        if options.dry_run:
            from dit_jax.planning.plan import describe_plan

            print(describe_plan(config))
            return 0
        from dit_jax.training.loop import train

        state = train(config)
    except ConfigError as error:
        return processes.end(launch.EXIT_BAD_OPTION, f"{program}: {error}")
    except launch.TrainingDivergedError as error:
        return processes.end(launch.EXIT_DIVERGED, f"{program}: {error}")
    except BucketError as error:
        return processes.end(launch.EXIT_FAILED, f"{program}: {error}")
    except Exception as error:
        processes.outlive(error)
        return processes.end(launch.EXIT_FAILED, traceback.format_exc())
    return 0 if int(state.step) >= config.train.steps else launch.EXIT_STOPPED
