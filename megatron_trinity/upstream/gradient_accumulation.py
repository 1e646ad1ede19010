"""Without Apex, Transformer Engine's product adds weights' gradients up in their buffers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="gradient-accumulation",
    symbols=("megatron.core.tensor_parallel.layers._grad_accum_fusion_available",),
    reason=(
        "megatron-core's own linear layers, of which the LM head is one, raise under "
        "`gradient_accumulation_fusion` without Apex's kernel, though Transformer Engine, whose "
        "layers need no Apex for it, has a product that adds to an fp32 buffer as well"
    ),
    written_for="megatron-core 0.19.2, Transformer Engine 2.20",
    remove_when="`ColumnParallelLinear` takes Transformer Engine's product where Apex is absent",
)


def install() -> None:
    """Stand where Apex's module would, if Transformer Engine is there and that is not."""
    from megatron.core.tensor_parallel import layers

    if layers._grad_accum_fusion_available or not layers.HAVE_TE:
        return
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=add_product, wgrad_gemm_accum_fp16=add_product
    )
    layers._grad_accum_fusion_available = True


def add_product(inputs: Tensor, of_output: Tensor, main_grad: Tensor) -> None:
    """`main_grad += of_output^T inputs`, summed in fp32.

    Args:
        inputs: `[n, in]`; of_output: `[n, out]`, of the same dtype.
        main_grad: `[out, in]`, of that dtype or fp32.
    """
    if main_grad.dtype == inputs.dtype:
        # torch's own rounds nothing to TF32, as Transformer Engine's would in fp32.
        main_grad.addmm_(of_output.t(), inputs)
        return
    from megatron.core.extensions import transformer_engine as megatrons
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    workspace: Any = getattr(megatrons, "_get_workspace", None)
    general_gemm(
        inputs,
        of_output,
        **({} if workspace is None else {"workspace": workspace()}),
        out_dtype=main_grad.dtype,
        layout="NT",
        out=main_grad,
        accumulate=True,
        grad=True,
    )
