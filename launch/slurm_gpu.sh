#!/usr/bin/env bash
# Train on GPU nodes under Slurm, one process per GPU:
#
#   sbatch --nodes 2 launch/slurm_gpu.sh --config configs/dit_xl2_imagenet256.py \
#       --data.dir /data/imagenet256 --train.workdir /data/runs/xl2
#
# Slurm tells the processes of each other. Three minutes before the time limit the run saves and stops (exit code
# 75), and the job queues itself again, as it does where a process is killed. Arguments are train.py's.
# First, once: make ACCEL=cuda12 test
#SBATCH --job-name=dit
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

[[ $# -gt 0 ]] || { sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
cd "${SLURM_SUBMIT_DIR:-.}"
PYTHON=${PYTHON:-.venv/bin/python}

# Reasons: docs/training.md, "Flags".
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/dit_jax}

# srun has not taken the CPUs per task over from the job since 22.05, and one CPU starves the loader.
cpus=${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}
# A process that has saved and stopped must not end the others, which may still be writing.
status=0
srun ${cpus:+"$cpus"} --kill-on-bad-exit=0 --wait=300 "$PYTHON" train.py "$@" || status=$?
# 137: a process was killed (a preempted node, say); one that is killed at every start must not go on for ever.
if [[ $status -eq 75 || ( $status -eq 137 && ${SLURM_RESTART_COUNT:-0} -lt 100 ) ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
