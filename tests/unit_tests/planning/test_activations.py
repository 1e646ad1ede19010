"""Kept bytes that are worked out, and those that autograd really holds."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest

from megatron_trinity.planning.activations import Activations
from megatron_trinity.planning.fake_ranks import fake_groups, parse_layout
from megatron_trinity.planning.kernels import Kernels, on_gpu
from megatron_trinity.planning.stages import stage_chunks
from tests.unit_tests.planning.kept import forward, gpu_forms

OFF = 0.05
BATCH, LENGTH = 2, 256
BF16 = ("--bf16",)
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules")
FULL = ("--recompute-granularity", "full", "--recompute-method")
MODES: dict[str, tuple[str, ...]] = {
    "none": (),
    **{name: (*SELECTIVE, name) for name in ("core_attn", "layernorm", "mlp", "moe")},
    "shared_experts": (*SELECTIVE, "shared_experts"),
    "three modules": (*SELECTIVE, "core_attn", "moe", "layernorm"),
    "uniform 1": (*FULL, "uniform", "--recompute-num-layers", "1"),
    "uniform 2": (*FULL, "uniform", "--recompute-num-layers", "2"),
    "block 2": (*FULL, "block", "--recompute-num-layers", "2"),
}
PRECISIONS = {"bf16": BF16, "fp32": ()}


def parsed(*flags: str, ranks: int = 1) -> Namespace:
    args = parse_layout("tiny", ranks, ("--micro-batch-size", str(BATCH), *flags))
    args.bias_swiglu_fusion = bool(args.bf16)
    return args


def kernels(args: Namespace) -> Kernels:
    """Those of `gpu_forms`."""
    return replace(on_gpu(args), swiglu=args.bias_swiglu_fusion, loss=bool(args.bf16))


def both(args: Namespace, documents: Any = None) -> tuple[dict[str, int], dict[str, int]]:
    """By layer and around them: worked out, and held."""
    activations = Activations(args, kernels(args))
    [[chunk]] = stage_chunks(args)
    with fake_groups(args, 0) as groups, gpu_forms(bool(args.bf16)):
        held, output = forward(args, groups, documents)
        assert output.shape == (4, BATCH, args.seq_length // args.context_parallel_size)
        real = held.by_place()
    total = activations.chunk(chunk).total() + activations.rope
    expected = {"total": total}
    if args.recompute_granularity != "full":
        modules = args.recompute_modules if args.recompute_granularity else ()
        expected |= {str(n): activations.layer(kind, modules).total() for n, kind in chunk.layers}
    return expected, {**real, "total": sum(real.values())}


CASES = [
    pytest.param(mode, precision, marks=[pytest.mark.slow] * (mode not in ("none", "uniform 1")))
    for mode in MODES
    for precision in PRECISIONS
    if precision == "bf16" or mode in ("none", "core_attn", "block 2")
]


@pytest.mark.parametrize(("mode", "precision"), CASES)
def test_recompute(mode: str, precision: str) -> None:
    expected, held = both(parsed(*MODES[mode], *PRECISIONS[precision]))
    for place, size in expected.items():
        assert size == pytest.approx(held[place], rel=OFF), place


TP = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
EP, CP = ("--expert-model-parallel-size", "2"), ("--context-parallel-size", "2")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "TP 2": (2, TP),
    "TP 2, ETP 1": (2, (*TP, "--expert-tensor-parallel-size", "1")),
    "EP 2": (2, EP),
    "TP 2, EP 2": (4, (*TP, *EP)),
    "CP 2, all-gather": (2, CP),
    "CP 2, a2a": (2, (*CP, "--cp-comm-type", "a2a")),
    "sequence-wise loss": (1, ("--seq-aux-loss-coeff", "0.001")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    """Of the first rank, where fake ranks send what it sends itself."""
    ranks, flags = LAYOUTS[name]
    expected, held = both(parsed(*BF16, *flags, ranks=ranks))
    assert expected["total"] == pytest.approx(held["total"], rel=OFF)


@pytest.mark.slow
def test_documents() -> None:
    args = parsed(*BF16, "--dataloader-inter-document-masking")
    expected, held = both(args, [[100, LENGTH - 100], [17, LENGTH - 17]])
    for place, size in expected.items():
        assert size == pytest.approx(held[place], rel=OFF), place
