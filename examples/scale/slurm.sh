#!/usr/bin/env bash
# A run on N nodes of 8 GPUs, one process to a GPU:
#
#   sbatch --nodes 4 examples/scale/slurm.sh examples/scale/1.3b.yaml model=hope-1.3b train.accumulate=4
#
# What follows the script goes to `nestopt train`. With `--resume RUN --trust` an interrupted run goes on, on any number of nodes.
#SBATCH --job-name=nestopt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
set -euo pipefail

# where the processes meet; each finds its own number in what srun tells it
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # not head, which ends before scontrol does
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false

srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python -m nestopt train "$@" --deepspeed "${DEEPSPEED_JSON:-examples/scale/ds_8x80gb.json}"
' nestopt "$@"
