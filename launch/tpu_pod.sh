#!/usr/bin/env bash
# Train on a Cloud TPU pod: ask for it as a queued resource, install on all workers, run the same command on each.
#
#   PROJECT=my-project ZONE=us-east5-b TYPE=v6e-256 REPO=https://github.com/me/dit_jax \
#       launch/tpu_pod.sh --config configs/dit_xl2_imagenet256.py --data.dir /mnt/data/imagenet256 \
#       --train.workdir /mnt/data/runs/xl2
#
# Run it again to go on: what exists is used. Arguments are train.py's; all workers must see the folders (Filestore,
# or a bucket mounted with gcsfuse). The workers' processes find each other through TPU metadata (--distributed).
set -euo pipefail

[[ $# -gt 0 ]] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
: "${PROJECT:?name of the Google Cloud project}" "${ZONE:?zone of the TPUs}" "${REPO:?git address of this repository}"
TYPE=${TYPE:-v5litepod-256}               # accelerator type: v4-128, v5litepod-256, v5p-128, v6e-256
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}   # v4: tpu-ubuntu2204-base, v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
NAME=${NAME:-dit}
REVISION=${REVISION:-main}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}    # the images' own, of Ubuntu 22.04, is 3.10: too old
SPOT=${SPOT:-}                            # 1: cheaper, may be taken back at any time; the run then goes on later

where=(--project "$PROJECT" --zone "$ZONE")
on_all_workers() { gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command "$1"; }

if ! gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" >/dev/null 2>&1; then
    gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id "$NAME" \
        --accelerator-type "$TYPE" --runtime-version "$RUNTIME" ${SPOT:+--spot}
fi
while :; do
    state=$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format 'value(state.state)')
    case $state in
        ACTIVE) break ;;
        FAILED | SUSPEND* | DELETING)  # as a spot resource is when it was taken back: it never becomes active again
            echo "$NAME is $state. Delete it, then run this again: gcloud compute tpus queued-resources delete" \
                "$NAME --project $PROJECT --zone $ZONE --force" >&2
            exit 1 ;;
    esac
    echo "$NAME is $state, waiting for $TYPE"
    sleep "${POLL_SECONDS:-60}"
done

on_all_workers "test -d dit_jax || git clone -q '$REPO' dit_jax; cd dit_jax && git fetch -q origin '$REVISION' && \
git checkout -q FETCH_HEAD && python3 -m pip install -q --user uv && export PATH=~/.local/bin:\$PATH && \
(test -d .venv || uv venv -q --python '$PYTHON_VERSION' .venv) && uv pip install -q -c requirements.txt -e '.[tpu]'"
printf -v arguments '%q ' "$@"
on_all_workers "cd dit_jax && .venv/bin/python train.py --distributed $arguments"
