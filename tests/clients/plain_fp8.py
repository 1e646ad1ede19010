"""A plugin for vLLM: plain torch where it has no FP8 kernel for the CPU at hand.

vLLM's kernels for blocks need AMX, and it has none for routed experts with a scale a row. With this
it still parses, names, merges and loads a checkpoint by itself, and it still takes a kernel of its
own where it has one; else weights are dequantised and multiplied in the inputs' type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8
from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle
from vllm.platforms import PlatformEnum


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`[rows, columns]`, each scale spread over its block."""
    for axis, size in enumerate(weight.shape):
        scale = scale.repeat_interleave(size // scale.shape[axis], axis)
    return (weight.float() * scale).to(dtype)


class PlainBlockLinear(CPUFp8BlockScaledMMKernel):
    """A linear layer with a scale for each block."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        return linear(x, dequantized(layer.weight, layer.weight_scale_inv, x.dtype), bias)


class PlainExperts(CPUExpertsFp8):
    """Routed experts with a scale for each block or for each row, one expert after the other."""

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return True

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *_: Any,
        **__: Any,
    ) -> None:
        output.zero_()
        for expert in range(w1.shape[0]):
            token, choice = (topk_ids == expert).nonzero(as_tuple=True)
            inputs = hidden_states[token]
            gate_up = dequantized(w1[expert], self.w1_scale[expert], inputs.dtype)
            down = dequantized(w2[expert], self.w2_scale[expert], inputs.dtype)
            gate, up = linear(inputs, gate_up).chunk(2, dim=-1)
            result = linear(silu(gate) * up, down) * topk_weights[token, choice, None]
            output.index_add_(0, token, result.to(output.dtype))


def register() -> None:
    """Offer both where vLLM has nothing better."""
    kernels._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(PlainBlockLinear)
    theirs = oracle.backend_to_kernel_cls

    def kernel_classes(backend: oracle.Fp8MoeBackend) -> list[Any]:
        # Triton's weights are those of the checkpoint, and it does not run on a CPU.
        return [PlainExperts] if backend == oracle.Fp8MoeBackend.TRITON else theirs(backend)

    oracle.backend_to_kernel_cls = kernel_classes
