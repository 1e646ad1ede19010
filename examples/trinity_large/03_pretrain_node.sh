#!/usr/bin/env bash
# What a node runs of Trinity Large on 512 GPUs: 64 nodes of 8.
#
#     DATA=data/mine TOKENIZER=data/tokenizer RUN=runs/large bash examples/trinity_large/03_pretrain_node.sh
#
# DATA is what tools/prepare_data.py was given as --output. Flags behind the command win over those
# below. DRY_RUN=1 prints the command and does nothing else. How it is started, and what is kept of
# it: scripts/launch.sh. On a cluster with Slurm: 04_pretrain_slurm.sbatch.
# On each of the 64 nodes: NODE_RANK is its number, MASTER_ADDR the name of the first one.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"

DATA=${DATA:-data/mine}
TOKENIZER=${TOKENIZER:-data/tokenizer}
RUN=${RUN:-runs/large}

MODEL=(--preset large)

PARALLEL=(
    # Sixteen chunks, two on each pipeline rank; the LM head stands with a single layer, since it
    # weighs as much as 2.5.
    --pipeline-model-parallel-size 8
    --pipeline-model-parallel-layout 'Et*4|(t*4|)*13t*3|tL'
    # Experts stay in the node, where their tokens travel over NVLink.
    --expert-model-parallel-size 8
    # Optimizer state is cut over the data-parallel ranks.
    --use-distributed-optimizer
    # Gradients are reduced while the backward pass goes on. Muon shares weights behind its step, so
    # that --overlap-param-gather is not for it.
    --overlap-grad-reduce
    # Every layer is computed again in the backward pass: up to a third more work, and the choice
    # that is safe for memory.
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
)

# The tokens of an expert travel by DeepEP's kernels, which send each token once to a rank that has
# several of its experts, and no copy of it to every expert.
EXCHANGE=(
    --moe-token-dispatcher-type flex
    --moe-flex-dispatcher-backend deepep
    # Tokens are sorted by expert in Transformer Engine's kernel, in place of a gather and a sort.
    --moe-permute-fusion
    # The shared expert computes while the tokens of the routed ones are on their way.
    --moe-shared-expert-overlap
)
# CUDA graphs are not here: a replay would take the documents of another micro-batch.

# The presets are in bf16, with fp32 gradients, router, norms and optimizer.
PRECISION=(
    # With it come fused RoPE, grouped products of the experts, and products of weights' gradients
    # that are added to the fp32 buffers as they are computed.
    --transformer-impl transformer_engine
)

DATA_FLAGS=(
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TOKENIZER"
    --train-data-path "${DATA}_train"
    --valid-data-path "${DATA}_valid"
)

TRAINING=(
    # 17 T tokens, in batches of 12288 sequences of 8192.
    --train-iters 170000
)

LOGGING=(
    --log-interval 10
    --tensorboard-dir "$RUN/tensorboard"
    --save "$RUN/checkpoints"
    --load "$RUN/checkpoints"
    --save-interval 500
    # Steps go on while a checkpoint is written.
    --async-save
)

export NODES=${NODES:-64} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
exec bash scripts/launch.sh pretrain_trinity.py "${MODEL[@]}" "${PARALLEL[@]}" "${EXCHANGE[@]}" \
    "${PRECISION[@]}" "${DATA_FLAGS[@]}" "${TRAINING[@]}" "${LOGGING[@]}" "$@"
