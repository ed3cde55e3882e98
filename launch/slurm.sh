#!/usr/bin/env bash
# Starts one process per GPU under Slurm; JAX finds addresses and ranks.
#
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh \
#         --config=mae_base --workdir=/shared/runs/mae_base --config.data.data_dir=/shared/tfds
#
# Two minutes before the time limit the run gets SIGTERM and saves. A run that was stopped by a
# signal (exit code 143) is put into the queue again and continues; any other end is final.
# --dry-run as the first argument prints the command.
#SBATCH --job-name=mim_jax
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
run=()
if [ "${1:-}" = --dry-run ]; then run=(echo); shift; fi
status=0
"${run[@]}" srun --kill-on-bad-exit=1 python -m mim_jax.main "$@" --distributed || status=$?
if [ "$status" = 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
