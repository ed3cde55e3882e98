#!/usr/bin/env bash
# Submits a run to TPUs on a GKE cluster, with the Google Cluster Toolkit (`gcluster job submit`).
#
#     CLUSTER=my-cluster LOCATION=us-east5-b PROJECT=my-project COMPUTE=v6e-16 BUCKET=my-bucket \
#         IMAGE=us-docker.pkg.dev/my-project/my-repo/mim_jax launch/gke.sh \
#         --config=mae_base --workdir=/bucket/runs/mae_base --config.data.data_dir=/bucket/tfds
#
# IMAGE is built from launch/Dockerfile. The bucket is mounted at /bucket. A preempted run has two
# minutes to save; it is restarted after it stopped by a signal (exit codes 130 and 143) or lost
# another process (1 and 134), but not after a mistake in its arguments (2).
# NAME, TOPOLOGY and SLICES are optional. --dry-run as the first argument prints the command.
set -euo pipefail
: "${CLUSTER:?the name of the cluster}" "${LOCATION:?its zone or region}" "${PROJECT:?the project}"
: "${COMPUTE:?the accelerators, as v6e-16}" "${BUCKET:?the bucket}" "${IMAGE:?the container image}"
run=()
if [ "${1:-}" = --dry-run ]; then run=(echo); shift; fi
command="python -m mim_jax.main$(printf ' %q' "$@") --distributed"
options=()
if [ -n "${TOPOLOGY:-}" ]; then options+=("--topology=$TOPOLOGY"); fi
"${run[@]}" "${GCLUSTER:-gcluster}" job submit \
    --project="$PROJECT" --cluster="$CLUSTER" --location="$LOCATION" \
    --name="${NAME:-mim-jax}" --image="$IMAGE" --compute-type="$COMPUTE" \
    --num-slices="${SLICES:-1}" --mount="gs://$BUCKET:/bucket:rw" \
    --grace-period=2m --restarts=100 --restart-on-exit-codes=1,130,134,143 \
    "${options[@]}" --command="$command"
