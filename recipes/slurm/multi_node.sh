#!/usr/bin/env bash
# One run on the GPUs of several nodes, which share the folder of the runs:  sbatch multi_node.sh RECIPE [--method pskd …]
#SBATCH --job-name=pskd_timm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# Signals, exit codes and resuming: as in single_node.sh.
set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

srun --kill-on-bad-exit=0 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}
  exec python -m pskd_timm train "$@"' rank "$@"
code=$?

if [[ $code == 138 || $code == 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
