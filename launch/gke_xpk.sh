#!/usr/bin/env bash
# Train on TPUs of a GKE cluster that xpk made (https://github.com/AI-Hypercomputer/xpk).
#
#   CLUSTER=my-cluster launch/gke_xpk.sh --config configs/dit_xl2_imagenet256.py \
#       --data.dir /data/imagenet256 --train.workdir /data/runs/xl2
#
# xpk puts this folder into a container on every host and starts the command there once per host; GKE's variables
# tell the processes of each other. A preempted or crashed job is started again by Kubernetes and goes on from its
# last checkpoint. Arguments are train.py's; /data must be a volume of the cluster (xpk storage attach).
set -euo pipefail

[[ $# -gt 0 ]] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
: "${CLUSTER:?name of the cluster}"
TYPE=${TYPE:-v5litepod-256}    # as the cluster's TPUs are called
WORKLOAD=${WORKLOAD:-dit}
SLICES=${SLICES:-1}            # of TYPE each; data parallel over the slow network between them
RESTARTS=${RESTARTS:-100}
RESTART_ON=${RESTART_ON:-1,75} # exit codes beside those of signals: an error, and stopped after saving
GRACE=${GRACE:-180}            # seconds from the signal to the kill, in which the run saves
IMAGE=${IMAGE:-python:3.12}

cd "$(dirname "$0")/.."
printf -v arguments '%q ' "$@"
# exec: xpk passes a stop on to the shell that it starts, not to that shell's children.
xpk workload create --cluster "$CLUSTER" --workload "$WORKLOAD" --tpu-type "$TYPE" --num-slices "$SLICES" \
    --max-restarts "$RESTARTS" --restart-on-exit-codes "$RESTART_ON" --termination-grace-period-seconds "$GRACE" \
    --base-docker-image "$IMAGE" --script-dir . \
    --command "pip install -q -c requirements.txt -e '.[tpu]' && exec python train.py --distributed $arguments"
