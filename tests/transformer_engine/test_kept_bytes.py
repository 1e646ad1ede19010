"""Kept bytes that are worked out, and those that Transformer Engine's layers really keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_trinity.arguments.precision import FP8_WORDS
from megatron_trinity.planning.activations import Activations
from megatron_trinity.planning.kernels import on_gpu
from megatron_trinity.planning.rank_parameters import counted_parameters
from megatron_trinity.planning.stages import stage_chunks
from megatron_trinity.planning.state import copies_in_fp8
from tests.distributed.pool import RankPools
from tests.unit_tests.planning.kept import forward

OFF = 0.05
UNTRIED = "fp8-mxfp8"
"""The emulation is of a GPU that has not got it."""
BATCH = 2
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules")
TE = ("--transformer-impl", "transformer_engine", "--moe-grouped-gemm", "--bf16")
WIDE = ("--hidden-size", "256", "--num-attention-heads", "8")
ENGINE: dict[str, tuple[str, ...]] = {
    "bf16": (),
    **{word: ("--precision", word) for word in FP8_WORDS if word != UNTRIED},
    "fp8-blockwise, moe": ("--precision", "fp8-blockwise", *SELECTIVE, "moe"),
    "fp8-blockwise, core_attn": ("--precision", "fp8-blockwise", *SELECTIVE, "core_attn"),
}


def engine(rank: int, world_size: int, flags: tuple[str, ...]) -> Any:
    """With the layers of Transformer Engine; and bytes of the weights' copies in FP8."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_trinity.planning.fake_ranks import parse_for_ranks

    words = ("--preset", "tiny", "--train-iters", "1", "--micro-batch-size", str(BATCH))
    args = parse_for_ranks(1, (*words, *TE, *WIDE, *flags))
    args.bias_swiglu_fusion = True
    # Neither is emulated.
    forms = replace(on_gpu(args), rope=False, permutation=False, loss=False)
    activations = Activations(args, forms)
    [[chunk]] = stage_chunks(args)
    parallel_state.initialize_model_parallel()
    held, output = forward(args, ProcessGroupCollection.use_mpu_process_groups())
    real, copies = held.by_place(), sum(held.copies())
    assert output.shape == (4, BATCH, args.seq_length)
    modules = args.recompute_modules if args.recompute_granularity else ()
    layers = {str(n): activations.layer(kind, modules).total() for n, kind in chunk.layers}
    found = {"copies": copies, **{place: real[place] for place in layers}}
    return {"copies": copies_in_fp8(args, counted_parameters(args, chunk)), **layers}, found


@pytest.mark.parametrize("name", ENGINE)
def test_transformer_engine(te_ranks: RankPools, name: str) -> None:
    [(expected, held)] = te_ranks.run(engine, ENGINE[name], world_size=1)
    for place, size in expected.items():
        assert size == pytest.approx(held[place], rel=OFF), place
