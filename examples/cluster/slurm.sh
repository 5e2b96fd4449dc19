#!/usr/bin/env bash
# Trains on several nodes of a SLURM cluster. From the project's folder: sbatch examples/cluster/slurm.sh
# docs/clusters.md says what each line is for.
#SBATCH --job-name=alignclip
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# what to change: the environment, the bucket, the run
# shellcheck disable=SC1091
source "${ALIGNCLIP_VENV:-.venv}/bin/activate"
run=(
  yamls/alignclip.yaml
  run_name=first
  data.streams.cc12m.remote=s3://my-bucket/cc12m
  data.streams.cc12m.local="/tmp/$USER/cc12m"
  "save_folder=s3://my-bucket/runs/{run_name}"
  dist_timeout=1800
)
run+=("$@") # key=value behind the script's name come last, and count

export LAUNCHER=${LAUNCHER:-composer} # or torchrun
export GPUS=${SLURM_GPUS_ON_NODE:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# runs on each node; exec: the launcher takes the shell's place, and gets its signals
# shellcheck disable=SC2016
on_a_node='
export TMPDIR="${TMPDIR:-/tmp}/alignclip-$SLURM_JOB_ID"
mkdir -p "$TMPDIR"
case $LAUNCHER in
  composer) exec composer -n "$GPUS" --world_size $((SLURM_NNODES * GPUS)) --node_rank "$SLURM_NODEID" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" pretrain.py "$@" ;;
  torchrun) exec torchrun --nproc-per-node "$GPUS" --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" pretrain.py "$@" ;;
  *) echo "LAUNCHER=$LAUNCHER: composer or torchrun" >&2; exit 2 ;;
esac'

# SLURM signals this shell when the job is cancelled or preempted, and not when its time is nearly up
trap 'exit 143' TERM

status=0
srun --kill-on-bad-exit=1 bash -c "$on_a_node" on_a_node "${run[@]}" || status=$?

if [ "$status" -eq 143 ]; then # all is saved: the same job goes on, when it has nodes again
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
