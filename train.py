"""Train a Diffusion Transformer: python train.py [--config configs/RECIPE.py] [--option value ...]."""

import sys
import traceback

from dit_jax import signals

if __name__ == "__main__":
    GO_ON = "the same command goes on from the last checkpoint"
    signals.leave_on_signals("train.py", f"interrupted; {GO_ON}", f"asked to stop; {GO_ON}")

from dit_jax.memory import keep_freed_memory

keep_freed_memory()  # before NumPy and JAX start threads

from dit_jax import processes
from dit_jax.compiler import keep_compiled_programs
from dit_jax.config import ConfigError, parse_args
from dit_jax.training import launch


def main() -> int:
    """Exit code 0: finished; 1: failed; 2: bad option; 3: diverged; 4: does not fit the chips of --compile-for; 75:
    stopped by a signal, the same command goes on; 130: interrupted by Ctrl-C before the first step, or by a second
    one. When one process of several fails, all end with its code."""
    keep_compiled_programs()
    try:
        options, rest, launch_help = launch.parse_launch()
        config = parse_args(rest, more_help=launch_help)
        if options.compile_for:
            from dit_jax.planning.compile_for import compile_training, print_report

            return print_report("train.py", lambda: compile_training(config, options.compile_for))
        launch.initialize(options)
        if options.dry_run:
            from dit_jax.planning.plan import describe_plan

            print(describe_plan(config))
            return 0
        from dit_jax.training.loop import train

        state = train(config)
    except ConfigError as error:
        return processes.end(launch.EXIT_BAD_OPTION, f"train.py: {error}")
    except launch.TrainingDivergedError as error:
        return processes.end(launch.EXIT_DIVERGED, f"train.py: {error}")
    except Exception:
        return processes.end(launch.EXIT_FAILED, traceback.format_exc())
    return 0 if int(state.step) >= config.train.steps else launch.EXIT_STOPPED


if __name__ == "__main__":
    signals.watch()
    sys.exit(main())
