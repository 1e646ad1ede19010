"""Megatron's flags that need CUDA, NCCL or a library that needs them, by what they are for."""

from __future__ import annotations

NEEDS_CUDA: dict[str, str] = {
    "communication of tensor parallelism under products (Transformer Engine)": """
        --tp-comm-overlap --no-tp-comm-bulk-wgrad --no-tp-comm-bulk-dgrad
        --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs --tp-comm-overlap-rs-dgrad
        --no-tp-comm-split-ag --no-tp-comm-split-rs --tp-comm-bootstrap-backend
        --tp-comm-overlap-cfg""",
    "FP8 (Transformer Engine), which --precision turns on": """
        --fp8-margin --fp8-amax-history-len --fp8-amax-compute-algo --first-last-layers-bf16
        --num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16""",
    "kernels of Transformer Engine, FlashAttention and others": """
        --transformer-impl --te-rng-tracker --use-te-activation-func --fused-residual-rmsnorm
        --use-transformer-engine-op-fuser --attention-backend --flash-attention-version
        --use-flash-attn --use-kitchen-attention --kitchen-attention-backend --moe-grouped-gemm
        --moe-single-grouped-weight --moe-single-grouped-bias --use-grouped-gemm-for-dense-mlp
        --use-grouped-gemm-for-shared-expert --moe-permute-fusion --moe-router-fusion
        --disable-bf16-reduced-precision-matmul""",
    "exchange of experts, and what overlaps with it": """
        --moe-enable-deepep --moe-flex-dispatcher-backend --moe-permute-fusion-into-hybridep
        --moe-hybridep-pad-uneven-dispatch-inputs --moe-flex-dispatcher-num-sms
        --moe-deepep-num-sms --moe-hybridep-num-sms --moe-hybridep-num-blocks-permute
        --moe-hybridep-num-blocks-unpermute --moe-hybridep-num-sms-preprocessing
        --moe-ncclep-static-shape --moe-ncclep-zero-copy --moe-shared-expert-overlap""",
    "activations and optimizer state outside of the device's memory": """
        --cpu-offloading-num-layers --cpu-offloading-retain-pinned-cpu-buffers
        --fine-grained-activation-offloading --offload-modules --min-offloaded-tensor-size
        --delta-offload-bytes-across-pp-ranks --activation-offload-fraction
        --fine-grained-offloading-max-inflight-offloads --optimizer-cpu-offload
        --optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload
        --overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-grads --no-pin-cpu-params""",
    "precision of the optimizer's state (Transformer Engine's Adam)": """
        --use-precision-aware-optimizer --main-grads-dtype --main-params-dtype --exp-avg-dtype
        --exp-avg-sq-dtype""",
    "NCCL": """
        --distributed-backend --pipeline-model-parallel-comm-backend
        --nccl-communicator-config-path --use-nccl-ub --disable-symmetric-registration
        --use-sharp --sharp-enabled-group --high-priority-stream-groups --use-ring-exchange-p2p
        --flight-recorder-dump-path --flight-recorder-trace-buffer-size
        --no-flight-recorder-dump-on-timeout --flight-recorder-include-stack-trace
        --no-flight-recorder-include-only-active --no-flight-recorder-extra-dump-on-exec""",
    "profiling and health of the device": """
        --nvtx-ranges --record-memory-history --memory-snapshot-path
        --gpu-sniff-test-interval --log-energy --log-device-memory-used
        --moe-routing-trace-path --moe-routing-trace-max-training-iters
        --moe-routing-trace-capture-logits --moe-routing-trace-capture-hidden-states
        --moe-routing-trace-dump-weights --save-activations-interval --save-dgrads-interval""",
}
"""What for to flags, each by the first of its names."""
