#!/usr/bin/env bash
# Five methods × three seeds, a GPU each:  sbatch array.sh RECIPE [--data.path DIR …]
# When all are done, `pskd-timm compare RECIPE --seeds 0 1 2` with the same settings finds them finished and makes the table.
#SBATCH --job-name=pskd_timm
#SBATCH --array=0-14
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
# Signals, exit codes and resuming: as in single_node.sh.
set -uo pipefail

methods=(baseline label_smoothing cskd tfkd pskd)
seeds=(0 1 2)
method=${methods[SLURM_ARRAY_TASK_ID / ${#seeds[@]}]}
seed=${seeds[SLURM_ARRAY_TASK_ID % ${#seeds[@]}]}

srun python -m pskd_timm train "$@" --method "$method" --seed "$seed"
code=$?

if [[ $code == 138 || $code == 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
