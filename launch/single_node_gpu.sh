#!/usr/bin/env bash
# Train on all GPUs of this machine, in one process; goes on by itself after a crash or a preemption.
#
#   launch/single_node_gpu.sh --config configs/dit_xl2_imagenet256.py --data.dir /data/imagenet256 \
#       --train.workdir runs/xl2
#
# Arguments are train.py's. First, once: make ACCEL=cuda12 test
set -euo pipefail

[[ $# -gt 0 ]] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
PYTHON=${PYTHON:-.venv/bin/python}
ATTEMPTS=${ATTEMPTS:-10}

# Reasons: docs/training.md, "Flags".
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/dit_jax}

stopped=
child=
# A stop is passed on: the run saves and ends with code 75, and is not started again.
pass_stop_on() { [[ -z $stopped || -z $child ]] || kill -TERM "$child" 2>/dev/null || true; }
trap 'stopped=1 interrupted=1; pass_stop_on' TERM INT
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    "$PYTHON" train.py "$@" &
    child=$!
    pass_stop_on  # one that came between the two lines above
    interrupted=1
    while [[ -n $interrupted ]]; do  # a signal ends "wait" early; bash remembers the code of a run that has ended
        interrupted=
        status=0
        wait "$child" || status=$?
    done
    child=
    # 0 finished, 2 bad option, 3 diverged: another attempt would end in the same way.
    [[ $status -eq 0 || $status -eq 2 || $status -eq 3 || -n $stopped ]] && exit "$status"
    echo "attempt $attempt of $ATTEMPTS ended with code $status; going on from the last checkpoint" >&2
done
exit "$status"
