"""Megatron's flags that are refused off their defaults, by the reason.

Ignored here, or of another model than AfMoE, or for something else than training. Where a row of
`REFUSALS` names the flag as well, that row is told first: it says more.
"""

from __future__ import annotations

REFUSED: dict[str, str] = {
    # What AfMoE is not.
    "latent attention is not part of AfMoE": """
        --multi-latent-attention --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim
        --v-head-dim --rotary-scaling-factor --mscale --mscale-all-dim --cache-mla-latents
        --mla-down-proj-fusion""",
    "multi-token prediction is not part of AfMoE": """
        --mtp-num-layers --mtp-loss-scaling-factor --mtp-use-repeated-layer --mtp-detach-heads
        --mtp-hybrid-override-pattern --mtp-standalone""",
    "sparse and linear attention are not part of AfMoE": """
        --experimental-attention-variant --dsa-indexer-n-heads --dsa-indexer-head-dim
        --dsa-indexer-topk --dsa-indexer-topk-freq --dsa-indexer-skip-topk-offset
        --dsa-indexer-loss-coeff --dsa-indexer-use-sparse-loss --dsa-kernel-backend
        --dsa-indexer-rope-interleaved --no-dsa-indexer-rotate-activation
        --no-dsa-indexer-scoring-relu --dsa-indexer-k-norm-epsilon --dsa-indexer-k-norm-fp32
        --linear-conv-kernel-dim --linear-key-head-dim --linear-value-head-dim
        --linear-num-key-heads --linear-num-value-heads --linear-attention-freq""",
    "state spaces, hybrid and heterogeneous layers are not part of AfMoE": """
        --is-hybrid-model --mamba-state-dim --mamba-head-dim --mamba-num-groups --mamba-num-heads
        --disable-mamba-mem-eff-path --mamba-training-ssm-states-dtype --hybrid-layer-pattern
        --hybrid-override-pattern --heterogeneous-layers-config-path
        --heterogeneous-layers-config-encoded-json --spec""",
    "AfMoE's attention has another softmax, norm or scale": """
        --softmax-type --qk-l2-norm --qk-clip --qk-clip-alpha --qk-clip-threshold --add-qkv-bias
        --apply-query-key-layer-scaling""",
    "local layers have plain RoPE over whole heads, global ones have none": """
        --position-embedding-type --rotary-percent --rotary-interleaved
        --rotary-seq-len-interpolation-factor --use-rope-scaling --rope-scaling-factor --rope-type
        --yarn-original-max-position-embeddings --yarn-beta-fast --yarn-beta-slow
        --yarn-correction-range-round-to-int --no-yarn-correction-range-round-to-int
        --relative-attention-num-buckets --relative-attention-max-distance --mrope-section
        --no-position-embedding""",
    "AfMoE has RMSNorm with plain gains, in front of and behind each sublayer": """
        --normalization --apply-layernorm-1p --apply-residual-connection-post-layernorm""",
    "AfMoE's MLPs are SwiGLU without biases or dropout": """
        --openai-gelu --squared-relu --quick-geglu --onnx-safe --glu-linear-offset
        --activation-func-clamp-value --use-fused-weighted-squared-relu --moe-latent-size
        --moe-mlp-glu-interleave-size --moe-shared-expert-glu-interleave-size
        --moe-shared-expert-gate --moe-apply-probs-on-input --hidden-dropout --attention-dropout
        --mlp-chunks-for-training""",
    "AfMoE's router has sigmoid scores in fp32, no groups, and drops no token; --load-balancing and"
    " --seq-aux-loss-coeff balance it": """
        --moe-aux-loss-coeff --moe-router-pre-softmax --moe-router-num-groups
        --moe-router-group-topk --moe-router-score-function --moe-router-load-balancing-type
        --moe-router-dtype --moe-z-loss-coeff --moe-input-jitter-eps --moe-expert-capacity-factor
        --moe-pad-expert-input-to-capacity --moe-token-drop-policy
        --moe-expert-rank-capacity-factor --moe-router-quantile-balancing-ema
        --moe-enable-routing-replay""",
    "it is for benchmarks of other routers": """
        --moe-router-force-load-balancing --moe-router-force-biased""",
    "SIGTERM, SIGUSR1 and SIGINT save and end a run by default": """
        --exit-signal-handler --exit-signal-handler-for-training
        --exit-signal-handler-for-dataloader""",
    "it times a forward pass with its waits for other ranks, and needs CUDA; --straggler-interval"
    " names the slow ranks": """
        --log-straggler --straggler-ctrlr-port --straggler-minmax-count
        --disable-straggler-on-startup""",
    "experts start from their own initial weights": """
        --moe-use-upcycling --moe-upcycling-granularity""",
    "initial weights are the report's, truncated normal by --init-method-std, and the embedding is"
    " scaled by --mup-enabled alone": """
        --embedding-init-method-std --init-method-xavier-uniform --data-parallel-random-init
        --no-initialization --init-model-with-meta-device --use-mup --mup-width-mult
        --mup-base-hidden-size --mup-embedding-mult --mup-output-mult --mup-base-head-dim
        --mup-attn-scale-power""",
    "it follows from Trinity's own flags": """
        --window-size --window-attn-skip-freq --no-rope-freq --moe-layer-freq
        --moe-shared-expert-intermediate-size --padded-vocab-size""",
    # What Megatron has beside pretraining.
    "it is of BERT, T5, retrieval or audio": """
        --encoder-num-layers --decoder-num-layers --encoder-seq-length --decoder-seq-length
        --bert-no-binary-head --mask-prob --short-seq-prob --sample-rate --vocab-extra-ids
        --ict-head-size --biencoder-projection-dim --biencoder-shared-query-context-model
        --ict-load --bert-load --titles-data-path --query-in-block-prob --use-one-sent-docs
        --evidence-data-path --retriever-report-topk-accuracies --retriever-score-scaling
        --block-data-path --embedding-path --indexer-batch-size --indexer-log-interval
        --output-bert-embeddings --bert-embedder-type""",
    "it is of vision models": """
        --num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction
        --data-per-class-fraction --no-data-sharding --head-lr-mult --vision-pretraining
        --vision-pretraining-type --vision-backbone-type --swin-backbone-type --mask-type
        --mask-factor --iter-per-epoch --dino-local-img-size --dino-local-crops-number
        --dino-head-hidden-size --dino-bottleneck-size --dino-freeze-last-layer
        --dino-norm-last-layer --dino-warmup-teacher-temp --dino-teacher-temp
        --dino-warmup-teacher-temp-epochs""",
    "it is of inference; export with tools/export_hf.py and serve with vLLM": """
        --inference-batch-times-seqlen-threshold --max-tokens-to-oom --use-legacy-static-engine
        --inference-max-requests --inference-max-seq-length --inference-dynamic-batching
        --inference-dynamic-batching-buffer-size-gb
        --inference-dynamic-batching-paused-buffer-size-gb
        --inference-dynamic-batching-mamba-memory-ratio --inference-dynamic-batching-block-size
        --inference-dynamic-batching-max-requests --inference-dynamic-batching-max-tokens
        --inference-dynamic-batching-num-cuda-graphs
        --inference-dynamic-batching-track-paused-request-events
        --inference-dynamic-batching-track-generated-token-events --decode-only-cuda-graphs
        --inference-cuda-graph-all-prefills --inference-cuda-graph-max-tokens
        --inference-dynamic-batching-unified-memory-level --enable-chunked-prefill
        --num-speculative-tokens --inference-dynamic-batching-prefix-caching
        --inference-dynamic-batching-prefix-caching-eviction-policy
        --inference-dynamic-batching-prefix-caching-coordinator-policy
        --inference-dynamic-batching-prefix-caching-routing-alpha
        --inference-dynamic-batching-prefix-caching-mamba-gb
        --inference-dynamic-batching-cuda-graph-mixed-prefill-count
        --inference-dynamic-batching-cuda-graph-sizing-distribution
        --inference-dynamic-batching-sampling-backend --use-same-sampling-seed-across-dp-ranks
        --inference-dynamic-batching-async-sched-mode --inference-dynamic-batching-logprobs-mode
        --inference-logging-step-interval --inference-text-gen-server-logging
        --inference-wandb-logging --inference-coordinator-port
        --mamba-inference-conv-states-dtype --mamba-inference-ssm-states-dtype
        --inference-use-synchronous-zmq-collectives --inference-disable-ep-consensus
        --inference-shards --inference-rng-tracker --inference-cuda-graph-scope
        --inference-fuse-tp-communication --inference-disable-triton-nvls-kernels
        --inference-grouped-gemm-backend --inference-moe-disable-fused-quant-kernels
        --inference-moe-token-dispatcher-type --moe-pad-experts-for-cuda-graph-inference
        --flash-decode --batch-invariant-mode --symmetric-ar-type --nccl-all-reduce-for-prefill
        --mlp-chunks-for-prefill --test-mode""",
    "it is of reinforcement learning": """
        --perform-rl-step --rl-prompts-per-eval --grpo-prompts-per-step --grpo-group-size
        --rl-generation-lag --rl-submission-granularity --rl-consumption-granularity
        --grpo-iterations --grpo-clamp-eps-lower --grpo-clamp-eps-upper --grpo-kl-beta
        --grpo-entropy-term-weight --grpo-filter-groups-with-same-reward --langrl-env-config
        --rl-default-temperature --rl-default-top-p --rl-default-top-k
        --rl-offload-optimizer-during-inference --rl-kv-cache-management-mode
        --rl-persist-cuda-graphs --rl-partial-rollouts --rl-inference-logprobs-is-correction
        --rl-importance-sampling-truncation-coef --rl-use-sequence-packing
        --rl-sequence-packing-max-sequences-per-bin --rl-sequence-packing-algo
        --rl-training-cuda-graphs --rl-inference-tensor-model-parallel-size
        --rl-inference-pipeline-model-parallel-size --rl-inference-expert-model-parallel-size
        --rl-inference-expert-tensor-model-parallel-size --rl-inference-model-unified-memory-level
        --rl-offload-inference-model-weights-when-idle --refit-method
        --rl-verify-model-weights-swap --rl-skip-bos-token --rl-profile --rl-profile-dir
        --rl-inference-parsers""",
    "it is of distillation and fine-tuning": """
        --logits-save-top-k --logits-save-top-p --logits-save-top-p-min-k --logits-save-dir
        --logits-save-dtype --logits-load-dir --logits-load-decode-threads
        --logits-load-prefetch-factor --logits-load-msc-prefetch-depth --logits-load-kd-loss-alpha
        --logits-load-ignore-errors --sft --sft-tokenizer-prompt-format --freeze-all-layers
        --chat-template""",
    # What nothing here reads, or what does not go together with the rest.
    "fill-in-the-middle is no part of how data is read here": """
        --fim-data --fim-rate --fim-spm-rate --fim-split-sample --fim-fragment-rate
        --fim-no-prefix --fim-prefix-token --fim-middle-token --fim-suffix-token --fim-pad-token
        --fim-eod-token""",
    "documents are kept apart by --dataloader-inter-document-masking alone": """
        --reset-position-ids --reset-attention-mask --hybrid-context-parallel
        --hierarchical-context-parallel-sizes --max-seqlen-per-dp-cp-rank""",
    "data come from indexed datasets named by paths": """
        --per-dataset-sequences-path --object-storage-cache-path --dataloader-fast-cache-load
        --dataloader-defer-npy-index-mmap""",
    "what is read follows from the seed and the description alone: no index is built or kept, and"
    " files are mapped": """
        --data-cache-path --num-dataset-builder-threads --mid-level-dataset-surplus
        --no-mmap-bin-files""",
    "the phases of a run stand in the file of --data": "--phase-transition-iterations",
    "Megatron's FSDP saves checkpoints that nothing verifies; use --use-distributed-optimizer": """
        --use-megatron-fsdp --use-torch-fsdp2 --data-parallel-sharding-strategy
        --outer-dp-sharding-strategy --no-gradient-reduce-div-fusion --fsdp-double-buffer
        --suggested-communication-unit-size --keep-fp8-transpose-cache
        --enable-full-sharding-in-hsdp --torch-fsdp2-no-reshard-after-forward
        --fsdp-manual-registration --create-all-gather-group --megatron-fsdp-main-params-dtype
        --megatron-fsdp-main-grads-dtype --megatron-fsdp-grad-comm-dtype
        --megatron-fsdp-enable-fine-grained-param-gather --megatron-fsdp-max-pool-double-buffer
        --fsdp-db-use-persist-buf-on-alloc-fail --no-strict-fsdp-dtensor-load""",
    "checkpoints here are whole or nothing, with a manifest of their own": """
        --save-retain-interval --non-persistent-save-interval --non-persistent-ckpt-type
        --non-persistent-global-ckpt-dir --non-persistent-local-ckpt-dir
        --non-persistent-local-ckpt-algo --replication --replication-jump --replication-factor
        --ckpt-convert-format --ckpt-convert-save --ckpt-convert-update-legacy-dist-opt-format
        --verify-integrity --enable-msc --override-ckpt-iteration
        --dist-ckpt-save-pre-mcore-014 --use-checkpoint-args --use-mp-args-from-checkpoint-args
        --no-use-tokenizer-model-from-checkpoint-args --no-stream-ckpt-dequant""",
    "it needs nvidia-resiliency-ext, which does not go with megatron-core 0.19.2": """
        --inprocess-restart --inprocess-max-iterations --inprocess-monitor-thread-interval
        --inprocess-monitor-process-interval --inprocess-progress-watchdog-interval
        --inprocess-heartbeat-interval --inprocess-soft-timeout --inprocess-hard-timeout
        --inprocess-heartbeat-timeout --inprocess-barrier-timeout --inprocess-completion-timeout
        --inprocess-last-call-wait --inprocess-termination-grace-time --inprocess-granularity
        --inprocess-active-world-size --inprocess-empty-cuda-cache --enable-ft-package
        --calc-ft-timeouts --ft-num-warmup-iters --async-ckpt-use-cpu-shm
        --fault-injector-ranks --fault-injector-num-ranks --fault-injector-fault-types
        --fault-injector-fault-probabilities --fault-injector-fault-delay
        --fault-injector-delay-start-iteration --fault-injector-mtti-seconds
        --fault-injector-offset-seconds --fault-injector-seed""",
    "it is of a service that is not public": """
        --adlr-autoresume --adlr-autoresume-interval --one-logger-project --one-logger-run-name
        --one-logger-async --app-tag-run-name --app-tag-run-version
        --run-workload-inspector-server""",
    "megatron-core 0.19.2 has dropped it or calls it by another name": """
        --batch-size --warmup --model-parallel-size --checkpoint-activations --use-dist-ckpt
        --dist-ckpt-format --ckpt-fully-parallel-save --disable-msc --cuda-graph-scope
        --use-mcore-models --moe-router-padding-for-fp8 --enable-cuda-graph
        --external-cuda-graph --moe-layer-recompute --yaml-cfg --lazy-mpu-init --local-rank
        --no-weight-decay-cond-type""",
    "--precision sets format and recipe of FP8 together": """
        --fp8-format --fp8-recipe --fp8-quantizer-factory""",
    "Transformer Engine has dropped it and would ignore it": """
        --fp8-interval --no-fp8-wgrad""",
    "it would send tokens to experts that they have not chosen, and their values into the scales of"
    " FP8; what an expert gets is padded with zeros, which change nothing": """
        --moe-router-padding-for-quantization""",
    "Muon cuts matrices into rows and hands them round, which parameters of eight bits do not take,"
    " and with AdamW they are not proved": """
        --fp8-param-gather --reuse-grad-buf-for-mxfp8-param-ag""",
    "what FP4, or layers whose precision a file chooses, compute of a Trinity model is not proved;"
    " use --precision": """
        --fp4-format --fp4-recipe --fp4-quantizer-factory --fp4-param-gather
        --te-precision-config-file""",
    "the optimizers here are muon and adam": """
        --sgd-momentum --lion-beta1 --lion-beta2                         """,
    "Trinity's Muon does not depend on the layout, and splits fused matrices": """
        --muon-scalar-optimizer --muon-tp-mode --muon-scale-mode --muon-no-split-qkv
        --muon-extra-scale-factor --no-use-layer-wise-param-layout""",
    "Trinity's loss has its own pass over the logits": """
        --cross-entropy-loss-fusion --cross-entropy-fusion-impl --fp16-lm-cross-entropy
        --defer-embedding-wgrad-compute --wgrad-deferral-limit --fp8-output-proj""",
    "a CUDA graph would replay a layer with the documents of another micro-batch, and a step whose"
    " gradient norm nobody looks at": """
        --cuda-graph-impl --cuda-graph-warmup-steps --cuda-graph-modules --optimizer-cuda-graph
        --delay-offload-until-cuda-graph""",
    "its schedule takes layers apart and leaves Trinity's loss, documents and router out; use"
    " --moe-shared-expert-overlap": """
        --overlap-moe-expert-parallel-comm --delay-wgrad-compute
        --overlap-dispatch-backward-with-experts-wgrad --ep-overlap-early-attn-memory-release
        --high-priority-a2a-comm-stream""",
    "it needs a limit on the tokens of a rank, and Trinity's router drops none": """
        --moe-paged-stash --moe-paged-stash-page-size --moe-paged-stash-buffer-size-factor-cuda
        --moe-paged-stash-buffer-size-factor-cpu""",
    "the core attention computes it otherwise": """
        --attention-softmax-in-fp32 --log-max-attention-logit --fp32-residual-connection""",
    "use --step-batch-size-schedule, whose thresholds are tokens": "--rampup-batch-size",
    "use --eval-iters; Megatron's pass over everything fails with one validation set": """
        --full-validation --multiple-validation-sets --validation-set-names""",
    "a mean over tokens is divided behind the sum over ranks": "--ddp-average-in-collective",
    "Megatron does not take it with distributed checkpoints": """
        --overlap-param-gather-with-optimizer-step""",
    "Megatron does not take it with sequence parallelism, without which it trains no experts": """
        --distribute-saved-activations""",
    "Megatron cannot write what a Trinity model is configured with": "--config-logger-dir",
    "ranks that do not communicate compute nothing that is true; tools/check_layout.py builds ranks"
    " without a cluster": "--fake-process-group",
    "nothing here reads it": """
        --moe-per-layer-logging --check-for-spiky-loss --no-pad-vocab-size""",
    "weights are shared by tensor parallelism alone": """
        --tensor-parallel-num-weight-shards --expert-tensor-parallel-num-weight-shards""",
}
"""Reason to flags, each by the first of its names."""
