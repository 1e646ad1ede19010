"""Which of the model's kernels a run has, as far as memory depends on it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernels:
    """Attributes:
    transformer_engine: whether linear layers, attention and experts are its own.
    fp8: whether their products are in FP8.
    swiglu: whether that of dense MLPs and shared experts keeps its input alone.
    rope: whether it keeps angles alone, and not their sines and cosines for each tensor.
    permutation: whether tokens are permuted by Transformer Engine.
    attention: whether windows and documents are one kernel, without a mask of tokens.
    loss: whether logits are worked on in the model's dtype.
    accumulation: whether gradients of weights are added to the buffer by the product itself.
    """

    transformer_engine: bool = False
    fp8: bool = False
    swiglu: bool = True
    rope: bool = False
    permutation: bool = False
    attention: bool = True
    loss: bool = True
    accumulation: bool = False


def on_gpu(args: Namespace) -> Kernels:
    """With Triton, on a GPU that has all kernels; those of Transformer Engine where it is asked
    for. Whether `args` was parsed on a GPU makes no difference."""
    half = bool(args.bf16 or args.fp16)
    engine = args.transformer_impl == "transformer_engine"
    return Kernels(
        transformer_engine=engine,
        fp8=bool(args.fp8),
        rope=engine,
        permutation=engine,
        attention=half or engine,
        loss=half,
        accumulation=engine,
    )


def on_cpu(args: Namespace) -> Kernels:
    """Without any of them."""
    return Kernels(swiglu=bool(args.bias_swiglu_fusion), attention=False, loss=False)
