#!/usr/bin/env bash
# Starts one process per GPU under Slurm; JAX finds addresses and ranks.
#
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh \
#         --config=configs/mae_base.py --workdir=/shared/runs/mae_base --config.data.data_dir=/shared/tfds
#
# Submit the same line again after a time limit or a failure: the run continues.
#SBATCH --job-name=mim_jax
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
set -euo pipefail
srun --kill-on-bad-exit=1 python -m mim_jax.main "$@" --distributed
