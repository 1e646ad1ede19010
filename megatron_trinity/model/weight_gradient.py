"""Where the gradient of a linear layer's weight goes, written block of rows by block of rows."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


class WeightGradient:
    """The gradient of a weight `[out, in]`, for autograd or added to `main_grad` at once.

    The second is `--gradient-accumulation-fusion`, in the way of Megatron's linear layers: kernels
    of Apex or Transformer Engine add the product to the buffer of `DistributedDataParallel`, whose
    hook is told so by `grad_added_to_main_grad` and runs on a gradient that nobody reads.
    """

    def __init__(self, weight: Tensor, into_main_grad: bool) -> None:
        self._weight = weight
        self._own = None if into_main_grad else torch.empty_like(weight)
        self._covered = 0

    def add(self, rows: slice, of_output: Tensor, inputs: Tensor) -> None:
        """Take in the gradient of the outputs that `rows` make; rows come in order.

        Args:
            of_output: `[n, rows]`, contiguous.
            inputs: `[n, in]`, contiguous.
        """
        if self._own is not None:
            torch.mm(of_output.t(), inputs, out=self._own[rows])
            self._covered = rows.stop
            return
        main_grad: Tensor = self._weight.main_grad  # type: ignore[attr-defined]
        kernels = layers.fused_weight_gradient_mlp_cuda
        add = (
            kernels.wgrad_gemm_accum_fp32
            if main_grad.dtype == torch.float32
            else kernels.wgrad_gemm_accum_fp16
        )
        add(inputs, of_output, main_grad[rows])

    def result(self) -> Tensor | None:
        """What autograd is given."""
        if self._own is not None:
            self._own[self._covered :] = 0  # rows that no block had: those that pad a vocabulary
            return self._own
        weight = self._weight
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True
        if layers.HAVE_TE:
            # One tensor that all layers share.
            dummy: Tensor = layers.get_dummy_wgrad(list(weight.shape), weight.dtype)
            return dummy
        return torch.empty_like(weight)
