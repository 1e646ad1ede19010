#!/usr/bin/env bash
# Trains Trinity Nano on a node of 8 GPUs.
#
#     DATA=data/mine TOKENIZER=data/tokenizer RUN=runs/nano bash examples/trinity_nano/03_pretrain_node.sh
#
# DATA is what tools/prepare_data.py was given as --output. Flags behind the command win over those
# below and those that all runs have, in scripts/flags.sh. DRY_RUN=1 prints the command and does
# nothing else. How it is started, and what is kept of it: scripts/launch.sh. On a cluster with
# Slurm: 04_pretrain_slurm.sbatch.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"

DATA=${DATA:-data/mine}
TOKENIZER=${TOKENIZER:-data/tokenizer}
RUN=${RUN:-runs/nano}

# shellcheck source=scripts/flags.sh
source scripts/flags.sh

MODEL=(--preset nano)

PARALLEL=("${SHARDED[@]}")

TRAINING=(
    # The preset has the report's batch, which is for hundreds of GPUs.
    --global-batch-size 256
    --train-iters 20000
)

export NODES=${NODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
exec bash scripts/launch.sh pretrain_trinity.py "${MODEL[@]}" "${PARALLEL[@]}" "${EXCHANGE[@]}" \
    "${PRECISION[@]}" "${DATA_FLAGS[@]}" "${TRAINING[@]}" "${LOGGING[@]}" "$@"
