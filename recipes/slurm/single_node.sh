#!/usr/bin/env bash
# One run on the GPUs of one node:  sbatch single_node.sh RECIPE [--method pskd --seed 0 …]
#SBATCH --job-name=pskd_timm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# Slurm sends USR1 to every rank five minutes before the time is up, TERM where the job is preempted. Each rank saves and ends
# with 138 or 143; the job goes back into the queue and the same command resumes the run. The ranks meet every tracking.log_every
# steps: that many steps and a save must fit into the time that Slurm leaves them.
set -uo pipefail

MASTER_ADDR=$(hostname)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# A task is a rank; no launcher stands between Slurm's signals and it.
srun --kill-on-bad-exit=0 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}
  exec python -m pskd_timm train "$@"' rank "$@"
code=$?

if [[ $code == 138 || $code == 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
