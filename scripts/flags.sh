# shellcheck shell=bash
# shellcheck disable=SC2034 # the arrays are for who sources this
# Flags that the runs of examples/ have in common, by purpose. To be sourced, with DATA, TOKENIZER
# and RUN set.

# Experts stay in the node, where their tokens travel over NVLink.
SHARDED=(
    --expert-model-parallel-size 8
    # Optimizer state is cut over the data-parallel ranks.
    --use-distributed-optimizer
    # Gradients are reduced while the backward pass goes on, and new weights are gathered bucket by
    # bucket under the next forward pass.
    --overlap-grad-reduce
    --overlap-param-gather
)

# Every layer is computed again in the backward pass: up to a third more work, and the choice that
# is safe for memory.
RECOMPUTE=(
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

LOGGING=(
    --log-interval 10
    --tensorboard-dir "$RUN/tensorboard"
    --save "$RUN/checkpoints"
    --load "$RUN/checkpoints"
    --save-interval 500
    # Steps go on while a checkpoint is written.
    --async-save
)
