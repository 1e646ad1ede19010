"""The model on Transformer Engine's layers against the portable one: logits and every gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from tests.gpu.emulated import find_emulated
from tests.gpu.machine import Machine, start
from tests.gpu.rows import Row, at_most, skipped

ENVIRONMENT = {"NVIDIA_TF32_OVERRIDE": "0"}
"""Transformer Engine lets cuBLAS round fp32 to TF32, which is no measure of its layers."""
FP32 = 1e-5
LOGITS, GRADIENTS, ROUNDING = 1.2, 1.5, 2e-2
"""In bf16 both are held to the portable model in fp32: errors of Transformer Engine's over those of
the portable model, and what may come on top of a gradient's."""
NO_ENGINE = "Transformer Engine is not installed"
FLAGS = ("--no-gradient-accumulation-fusion",)  # there are no buffers to accumulate in


def rows(machine: Machine) -> Iterator[Row]:
    if machine.toy:
        if not find_emulated():
            yield skipped("logits and gradients", NO_ENGINE)
            return
        from tests.transformer_engine.worker import load_emulated

        load_emulated()
    start(machine, groups=False)
    from megatron_trinity.upstream.installed import find_installed

    if not machine.toy and find_installed().transformer_engine is None:
        yield skipped("logits and gradients", NO_ENGINE)
        return
    sizes: dict[str, Any] = machine.size(
        {
            "vocab_size": 1024,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "moe_intermediate_size": 256,
            "num_attention_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "max_position_embeddings": 1024,
        },
        {},
    )
    length, packed = machine.size((512, ((5, 1, 200, 306), (300, 212))), (37, ((5, 32), (20, 17))))
    for name, documents in (("whole sequences", None), ("documents", packed)):
        yield from of_case(name, sizes, length, documents)


def of_case(
    name: str, sizes: dict[str, Any], length: int, documents: Sequence[Sequence[int]] | None
) -> Iterator[Row]:
    from tests.transformer_engine.models import TE, distances

    portable = ("--transformer-impl", "local")
    exact = run(sizes, length, portable, documents)
    found = distances(run(sizes, length, TE, documents), exact)
    worst = max(found, key=found.__getitem__)
    yield at_most(f"{name}, fp32: logits", found["logits"], FP32)
    yield at_most(f"{name}, fp32: gradients, {worst} the worst", found[worst], FP32)

    allowed = distances(run(sizes, length, ("--bf16", *portable), documents), exact)
    errors = distances(run(sizes, length, ("--bf16", *TE), documents), exact)
    yield at_most(f"{name}, bf16: logits", errors["logits"], LOGITS * allowed["logits"])
    over = {key: error - GRADIENTS * allowed[key] for key, error in errors.items()}
    worst = max(over, key=over.__getitem__)
    bound = GRADIENTS * allowed[worst] + ROUNDING
    yield at_most(f"{name}, bf16: gradients, {worst} the worst", errors[worst], bound)


def run(
    sizes: dict[str, Any],
    length: int,
    flags: Sequence[str],
    documents: Sequence[Sequence[int]] | None,
) -> dict[str, Tensor]:
    from megatron.core import parallel_state

    from tests.transformer_engine.models import run_model

    found, _ = run_model(0, 1, sizes, length, (*FLAGS, *flags), documents, apart=True)
    parallel_state.destroy_model_parallel()
    return {name: tensor.cpu() for name, tensor in found.items()}
