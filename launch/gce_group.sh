#!/usr/bin/env bash
# Starts a run on a TPU slice of several hosts of Compute Engine, as a managed instance group.
#
#     PROJECT=my-project ZONE=us-east5-a MACHINE=ct6e-standard-4t TOPOLOGY=4x4 BUCKET=my-bucket \
#         launch/gce_group.sh --config=mae_base --workdir=gs://my-bucket/runs/mae_base \
#         --config.data.data_dir=gs://my-bucket/tfds
#     PROJECT=... launch/gce_group.sh --delete    # ends the run, and the costs of the slice
#
# The program is copied to the bucket, and every host installs and starts it when it boots. A run
# that failed or was stopped by a signal (exit codes 1, 130, 134 and 143) is started again; one that is
# done (0) or has a mistake in its arguments (2) is not. NAME, IMAGE_FAMILY and TEMPLATE_FLAGS (of
# `gcloud compute instance-templates create`, as "--provisioning-model=SPOT
# --instance-termination-action=STOP") are optional. --dry-run as the first argument prints the
# commands.
set -euo pipefail
: "${PROJECT:?the project}" "${ZONE:?the zone}" "${MACHINE:?the machine type, as ct6e-standard-4t}"
: "${TOPOLOGY:?the chips of the slice, as 4x4}" "${BUCKET:?the bucket for the program}"
gcloud=("${GCLOUD:-gcloud}")
if [ "${1:-}" = --dry-run ]; then gcloud=(echo "${gcloud[@]}"); shift; fi
name=${NAME:-mim-jax} region=${ZONE%-*} per_host=${MACHINE##*-}
hosts=$((${TOPOLOGY//x/*} / ${per_host%t}))
archive=gs://$BUCKET/programs/$name.tar.gz
read -ra flags <<<"${TEMPLATE_FLAGS:-}"

if [ "${1:-}" = --delete ]; then
    "${gcloud[@]}" compute instance-groups managed delete "$name" \
        --project="$PROJECT" --zone="$ZONE" --quiet
    "${gcloud[@]}" compute instance-templates delete "$name" --project="$PROJECT" --quiet
    "${gcloud[@]}" compute resource-policies delete "$name" \
        --project="$PROJECT" --region="$region" --quiet
    exit
fi

work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
cat >"$work/start.sh" <<END
#!/usr/bin/env bash
set -euo pipefail
export HOME=/root
mkdir -p /mim_jax
cd /mim_jax
gcloud storage cat $archive | tar --extract --gzip
launch/install.sh tpu,gcs
systemd-run --unit=mim_jax --working-directory=/mim_jax --setenv=HOME=/root \\
    --property=Restart=on-failure --property=RestartPreventExitStatus=2 \\
    --property=RestartSec=30 --property=TimeoutStopSec=100 --property=After=network-online.target \\
    /root/venv/bin/python -m mim_jax.main$(printf ' %q' "$@") --distributed
END
tar --create --gzip --file="$work/program.tar.gz" \
    pyproject.toml README.md LICENSE NOTICE configs launch mim_jax
if [ "${gcloud[0]}" = echo ]; then cat "$work/start.sh"; fi
"${gcloud[@]}" storage cp "$work/program.tar.gz" "$archive"
"${gcloud[@]}" compute resource-policies create workload-policy "$name" \
    --project="$PROJECT" --region="$region" \
    --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY"
"${gcloud[@]}" compute instance-templates create "$name" \
    --project="$PROJECT" --machine-type="$MACHINE" --maintenance-policy=TERMINATE \
    --image-project=ubuntu-os-accelerator-images \
    --image-family="${IMAGE_FAMILY:-ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e}" \
    --boot-disk-size=100GB --scopes=cloud-platform \
    --metadata-from-file=startup-script="$work/start.sh" "${flags[@]}"
"${gcloud[@]}" compute instance-groups managed create "$name" \
    --project="$PROJECT" --zone="$ZONE" --template="$name" --size="$hosts" \
    --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing \
    --workload-policy="projects/$PROJECT/regions/$region/resourcePolicies/$name"
