#!/usr/bin/env bash
# Trains Trinity Mini on a node of 8 GPUs.
#
#     DATA=data/mine TOKENIZER=data/tokenizer RUN=runs/mini bash examples/trinity_mini/03_pretrain_node.sh
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
RUN=${RUN:-runs/mini}

# shellcheck source=scripts/flags.sh
source scripts/flags.sh

MODEL=(--preset mini)

PARALLEL=(
    "${SHARDED[@]}"
    # A rank's state alone is at most 69 GB.
    "${RECOMPUTE[@]}"
)

TRAINING=(
    # The preset has the report's batch, which is for hundreds of GPUs.
    --global-batch-size 256
    --train-iters 20000
)

export NODES=${NODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
exec bash scripts/launch.sh pretrain_trinity.py "${MODEL[@]}" "${PARALLEL[@]}" "${EXCHANGE[@]}" \
    "${PRECISION[@]}" "${DATA_FLAGS[@]}" "${TRAINING[@]}" "${LOGGING[@]}" "$@"
