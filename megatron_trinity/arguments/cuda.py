"""Megatron's flags on a machine without CUDA: defaults that hold there, and refusals.

A default of Megatron that needs CUDA is replaced with one that does not, before the command line is
read; what a user asks for by name is never overridden, but refused if it needs CUDA.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron_trinity.arguments.precision import FP8_WORDS
from megatron_trinity.arguments.refusal import told, word_of
from megatron_trinity.errors import UsageError


@dataclass(frozen=True)
class CudaOnly:
    """A flag that needs CUDA for some of its values.

    Attributes:
        dest: attribute of the parsed arguments.
        flag: the option as the user writes it.
        needs_cuda: whether a value of `dest` needs CUDA.
        instead: what to do on a machine without CUDA, a message as those of `Refusal`.
    """

    dest: str
    flag: str
    needs_cuda: Callable[[Any], bool]
    instead: str


def _is_not(value: Any) -> Callable[[Any], bool]:
    return lambda given: given != value


def _one_of(*values: str) -> Callable[[Any], bool]:
    return lambda given: word_of(given) in values


_LEAVE_OUT = "leave it out"

CUDA_ONLY: tuple[CudaOnly, ...] = (
    CudaOnly("distributed_backend", "--distributed-backend", _is_not("gloo"), "use gloo"),
    CudaOnly("transformer_impl", "--transformer-impl", _is_not("local"), "use local"),
    CudaOnly("precision", "--precision", _one_of(*FP8_WORDS), "use bf16"),
    CudaOnly("te_rng_tracker", "--te-rng-tracker", bool, _LEAVE_OUT),
    CudaOnly("use_te_activation_func", "--use-te-activation-func", bool, _LEAVE_OUT),
    CudaOnly("fused_residual_rmsnorm", "--fused-residual-rmsnorm", bool, _LEAVE_OUT),
    CudaOnly(
        "attention_backend",
        "--attention-backend",
        _one_of("flash", "fused"),
        "use auto or unfused",
    ),
    CudaOnly("use_flash_attn", "--use-flash-attn", bool, _LEAVE_OUT),
    CudaOnly("tp_comm_overlap", "--tp-comm-overlap", bool, _LEAVE_OUT),
    CudaOnly("moe_grouped_gemm", "--moe-grouped-gemm", bool, _LEAVE_OUT),
    CudaOnly("moe_permute_fusion", "--moe-permute-fusion", bool, _LEAVE_OUT),
    CudaOnly("moe_shared_expert_overlap", "--moe-shared-expert-overlap", bool, _LEAVE_OUT),
    CudaOnly("moe_enable_deepep", "--moe-enable-deepep", bool, _LEAVE_OUT),
    CudaOnly(
        "moe_token_dispatcher_type",
        "--moe-token-dispatcher-type",
        _one_of("flex"),
        "use alltoall or allgather",
    ),
    CudaOnly("use_precision_aware_optimizer", "--use-precision-aware-optimizer", bool, _LEAVE_OUT),
    CudaOnly("optimizer_cpu_offload", "--optimizer-cpu-offload", bool, _LEAVE_OUT),
    CudaOnly("cpu_offloading_num_layers", "--cpu-offloading-num-layers", bool, _LEAVE_OUT),
    CudaOnly("nccl_ub", "--use-nccl-ub", bool, _LEAVE_OUT),
    CudaOnly("use_sharp", "--use-sharp", bool, _LEAVE_OUT),
)


def cpu_argument_defaults() -> Mapping[str, Any]:
    """The defaults that replace those of Megatron that are for CUDA: argparse dest -> value."""
    return MappingProxyType(
        {
            "apply_rope_fusion": False,
            "bias_swiglu_fusion": False,  # needs no CUDA, but is slow where it is not compiled
            "distributed_backend": "gloo",
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            "muon_fp32_matmul_prec": "high",  # bf16 runs, but many times slower than fp32
            "no_persist_layer_norm": True,
            "transformer_impl": "local",
            "use_cpu_initialization": True,
        }
    )


def set_cpu_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make `cpu_argument_defaults()` the defaults of a parser that has Megatron's arguments.

    For use in an `extra_args_provider`, which Megatron calls with its parser. Megatron's own
    `args_defaults` would not do: they only fill in arguments that are None after parsing, and leave
    the ones that default to True as they are.
    """
    parser.set_defaults(**cpu_argument_defaults())
    return parser


def refuse_cuda_only_arguments(args: argparse.Namespace) -> None:
    """Refuse, by name, what was asked for and needs CUDA.

    To be called after parsing (and after presets are merged), before Megatron validates.

    Raises:
        UsageError: lists every such flag, with what to do instead.
    """
    complaints = [
        f"{rule.flag} ({told(rule.instead, args)})"
        for rule in CUDA_ONLY
        if hasattr(args, rule.dest) and rule.needs_cuda(getattr(args, rule.dest))
    ]
    if complaints:
        raise UsageError("needs CUDA, which this machine does not have: " + "; ".join(complaints))
