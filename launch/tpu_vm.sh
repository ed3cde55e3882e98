#!/usr/bin/env bash
# Runs a command on every host of a Cloud TPU slice made with `gcloud compute tpus` (the legacy TPU
# API, v2 to v6e).
#
#     TPU=my-pod ZONE=us-central2-b launch/tpu_vm.sh \
#         --config=mae_base --workdir=/mnt/shared/mae_base --config.data.data_dir=gs://bucket/tfds
#
# The current directory is copied to every host. The run directory must be visible to all hosts.
# After a preemption, the same line continues the run. --dry-run as the first argument prints the
# commands.
set -euo pipefail
: "${TPU:?the name of the TPU}" "${ZONE:?the zone of the TPU}"
gcloud=("${GCLOUD:-gcloud}")
if [ "${1:-}" = --dry-run ]; then gcloud=(echo "${gcloud[@]}"); shift; fi
"${gcloud[@]}" compute tpus tpu-vm scp --recurse . "$TPU:mim_jax_checkout" --zone="$ZONE" --worker=all
"${gcloud[@]}" compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
    cd mim_jax_checkout && launch/install.sh tpu,gcs &&
    ~/venv/bin/python -m mim_jax.main $(printf '%q ' "$@") --distributed"
