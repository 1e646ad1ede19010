"""From a record of what is installed to defaults, refusals and the line at start."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_trinity.arguments.cuda import CUDA_ONLY
from megatron_trinity.arguments.installed import (
    FUSIONS,
    NEEDS,
    chosen,
    gpu_argument_defaults,
    refuse_what_is_not_installed,
)
from megatron_trinity.errors import UsageError
from megatron_trinity.upstream.installed import Installed

NOTHING = Installed()
ALL = Installed("2.20.2", apex=True, wgrad_fusion=True, deep_ep=True, triton=True)

ROPE, PERMUTE, SWIGLU, WGRAD = (fusion.dest for fusion in FUSIONS)


@pytest.mark.parametrize(
    ("installed", "on"),
    [
        (NOTHING, set()),
        (ALL, {ROPE, PERMUTE, SWIGLU, WGRAD}),
        (Installed(triton=True), {SWIGLU}),
        (Installed("2.20.2"), {ROPE, WGRAD}),
        (Installed("2.20.2", triton=True), {ROPE, PERMUTE, SWIGLU, WGRAD}),
        (Installed("2.20.2+abc", triton=True), {ROPE, PERMUTE, SWIGLU, WGRAD}),
        (Installed("2.0.1", triton=True), {ROPE, SWIGLU}),
        (Installed("1.3", triton=True), {SWIGLU}),
        (Installed("2.1.0.dev0", triton=True), {ROPE, PERMUTE, SWIGLU, WGRAD}),
        (Installed(apex=True), set()),
        (Installed(apex=True, wgrad_fusion=True), {WGRAD}),
        (Installed(deep_ep=True), set()),
    ],
)
def test_defaults(installed: Installed, on: set[str]) -> None:
    defaults = gpu_argument_defaults(installed)
    # The core attention has a softmax of its own, whatever is installed.
    assert defaults.pop("masked_softmax_fusion") is False
    layers = defaults.pop("transformer_impl")
    assert layers == (
        "transformer_engine"
        if installed.transformer_engine in ("2.20.2", "2.20.2+abc", "2.1.0.dev0")
        else "local"
    )
    assert defaults == {dest: dest in on for dest in (ROPE, PERMUTE, SWIGLU, WGRAD)}


def arguments(**given: object) -> Namespace:
    nothing = {rule.dest: None for rule in CUDA_ONLY}
    plain = {
        "distributed_backend": "nccl",
        "transformer_impl": "local",
        "attention_backend": "auto",
        "moe_token_dispatcher_type": "alltoall",
    }
    return Namespace(**{**nothing, **plain, **given})


def test_nothing_is_refused_that_was_not_asked_for() -> None:
    refuse_what_is_not_installed(arguments(), NOTHING)


@pytest.mark.parametrize(
    ("dest", "value", "library"),
    [
        ("transformer_impl", "transformer_engine", "Transformer Engine"),
        ("precision", "fp8-blockwise", "Transformer Engine 2.3, which fp8-blockwise needs,"),
        ("moe_permute_fusion", True, "Transformer Engine"),
        ("moe_grouped_gemm", True, "Transformer Engine"),
        ("attention_backend", "flash", "Transformer Engine"),
        ("use_precision_aware_optimizer", True, "Transformer Engine"),
        ("moe_token_dispatcher_type", "flex", "DeepEP"),
        ("moe_enable_deepep", True, "DeepEP"),
    ],
)
def test_what_is_asked_for_and_missing_is_refused(dest: str, value: object, library: str) -> None:
    args = arguments(**{dest: value})
    with pytest.raises(
        UsageError, match=f"^--[a-z0-9-]+: {library} is not installed; leave it out"
    ):
        refuse_what_is_not_installed(args, NOTHING)
    refuse_what_is_not_installed(args, ALL)


def test_an_old_transformer_engine_is_none() -> None:
    with pytest.raises(UsageError, match="Transformer Engine is not installed"):
        refuse_what_is_not_installed(arguments(moe_grouped_gemm=True), Installed("1.14"))


@pytest.mark.parametrize(
    ("recipe", "before", "first"),
    [
        ("fp8-tensorwise", "2.1.0", "2.2.0"),
        ("fp8-blockwise", "2.2.0", "2.3.0"),
        ("fp8-delayed", "2.0.0", "2.1.0"),
        ("fp8-mxfp8", "2.0.0", "2.1.0"),
    ],
)
def test_a_recipe_needs_a_version(recipe: str, before: str, first: str) -> None:
    args = arguments(precision=recipe)
    with pytest.raises(UsageError, match=f"Engine {first[:3]}, which {recipe} needs, is not"):
        refuse_what_is_not_installed(args, Installed(before))
    refuse_what_is_not_installed(args, Installed(first))


def test_all_are_told_at_once() -> None:
    args = arguments(moe_grouped_gemm=True, te_rng_tracker=True, moe_enable_deepep=True)
    message = r"^--te-rng-tracker, --moe-grouped-gemm: .*; --moe-enable-deep"
    with pytest.raises(UsageError, match=message):
        refuse_what_is_not_installed(args, NOTHING)


def test_every_flag_that_needs_a_library_needs_cuda() -> None:
    assert set(NEEDS) <= {rule.flag for rule in CUDA_ONLY}


@pytest.mark.parametrize(
    ("installed", "off", "line"),
    [
        (
            NOTHING,
            set(),
            "layers: portable; kernels: those of torch; fused: nothing; not fused: RoPE (needs "
            "Transformer Engine), "
            "the permutation of tokens (needs Transformer Engine and Triton), SwiGLU (needs Triton "
            "with a C compiler), the accumulation of gradients (needs Transformer Engine "
            "or NVIDIA's Apex)",
        ),
        (
            ALL,
            {ROPE},
            "layers: of Transformer Engine; kernels: Transformer Engine 2.20.2, Apex, DeepEP, "
            "Triton; fused: the permutation of "
            "tokens, SwiGLU, the accumulation of gradients; not fused: RoPE (as asked)",
        ),
        (
            ALL,
            set(),
            "layers: of Transformer Engine; kernels: Transformer Engine 2.20.2, Apex, DeepEP, "
            "Triton; fused: RoPE, the "
            "permutation of tokens, SwiGLU, the accumulation of gradients",
        ),
    ],
)
def test_the_line(installed: Installed, off: set[str], line: str) -> None:
    args = Namespace(**{**gpu_argument_defaults(installed), **dict.fromkeys(off, False)})
    assert chosen(args, installed) == line
