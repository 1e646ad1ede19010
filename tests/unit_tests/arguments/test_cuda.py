"""Megatron's flags on a machine without CUDA: defaults that hold, and refusals by name."""

from __future__ import annotations

import argparse

import pytest

from megatron_trinity.arguments.cuda import (
    CUDA_ONLY,
    cpu_argument_defaults,
    refuse_cuda_only_arguments,
    set_cpu_defaults,
)
from megatron_trinity.arguments.precision import add_precision_arguments
from megatron_trinity.errors import UsageError
from megatron_trinity.upstream import adapt_megatron


@pytest.fixture(autouse=True, scope="module")
def _adapted() -> None:
    adapt_megatron()


def _parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser())
    add_precision_arguments(parser)
    return set_cpu_defaults(parser)


def test_defaults_hold_on_a_cpu() -> None:
    args = _parser().parse_args([])
    for dest, value in cpu_argument_defaults().items():
        assert getattr(args, dest) == value, dest
    refuse_cuda_only_arguments(args)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--distributed-backend", "nccl"], "--distributed-backend (use gloo)"),
        (["--transformer-impl", "transformer_engine"], "--transformer-impl (use local)"),
        (["--precision", "fp8-blockwise"], "--precision (use bf16)"),
        (["--moe-grouped-gemm"], "--moe-grouped-gemm"),
        (["--moe-token-dispatcher-type", "flex"], "--moe-token-dispatcher-type (use alltoall"),
        (["--attention-backend", "flash"], "--attention-backend"),
    ],
)
def test_what_needs_cuda_is_refused_by_name(given: list[str], named: str) -> None:
    args = _parser().parse_args(given)
    with pytest.raises(UsageError) as refusal:
        refuse_cuda_only_arguments(args)
    assert named in str(refusal.value)
    assert "needs CUDA" in str(refusal.value)


def test_all_refusals_are_told_at_once() -> None:
    args = _parser().parse_args(["--te-rng-tracker", "--tp-comm-overlap"])
    with pytest.raises(UsageError, match=r"--te-rng-tracker.*--tp-comm-overlap"):
        refuse_cuda_only_arguments(args)


def test_every_default_and_refusal_is_an_argument_of_megatron() -> None:
    args = _parser().parse_args([])
    for dest in (*cpu_argument_defaults(), *(rule.dest for rule in CUDA_ONLY)):
        assert hasattr(args, dest), dest
