#!/usr/bin/env bash
# What a node runs of Trinity Large on 512 GPUs: 64 nodes of 8.
#
#     DATA=data/mine TOKENIZER=data/tokenizer RUN=runs/large bash examples/trinity_large/03_pretrain_node.sh
#
# DATA is what tools/prepare_data.py was given as --output. Flags behind the command win over those
# below and those that all runs have, in scripts/flags.sh. DRY_RUN=1 prints the command and does
# nothing else. How it is started, and what is kept of it: scripts/launch.sh. On a cluster with
# Slurm: 04_pretrain_slurm.sbatch.
# On each of the 64 nodes: NODE_RANK is its number, MASTER_ADDR the name of the first one.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"

DATA=${DATA:-data/mine}
TOKENIZER=${TOKENIZER:-data/tokenizer}
RUN=${RUN:-runs/large}

# shellcheck source=scripts/flags.sh
source scripts/flags.sh

MODEL=(--preset large)

PARALLEL=(
    # Sixteen chunks, two on each pipeline rank; the LM head stands with a single layer, since it
    # weighs as much as 2.5.
    --pipeline-model-parallel-size 8
    --pipeline-model-parallel-layout 'Et*4|(t*4|)*13t*3|tL'
    "${SHARDED[@]}"
    "${RECOMPUTE[@]}"
)

TRAINING=(
    # 17 T tokens, in batches of 12288 sequences of 8192.
    --train-iters 170000
)

export NODES=${NODES:-64} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
exec bash scripts/launch.sh pretrain_trinity.py "${MODEL[@]}" "${PARALLEL[@]}" "${EXCHANGE[@]}" \
    "${PRECISION[@]}" "${DATA_FLAGS[@]}" "${TRAINING[@]}" "${LOGGING[@]}" "$@"
