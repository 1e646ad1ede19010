"""Ranks of the real presets, up to 2048 of them, built on fake groups and the meta device."""

from __future__ import annotations

import os
from argparse import Namespace
from collections import Counter
from fractions import Fraction

import pytest
import torch.distributed as dist

from megatron_trinity.errors import TrinityError, UsageError
from megatron_trinity.model.boxes import cover
from megatron_trinity.planning.fake_ranks import (
    build_rank,
    parse_layout,
    sample_ranks,
    stage_ranks,
)
from megatron_trinity.planning.layout_check import BALANCE, LayoutCheck, summary_row
from megatron_trinity.planning.layouts import RECOMMENDED, Layout, recommended
from tests.crosses import first
from tests.unit_tests.planning.presets import PRESETS
from tests.unit_tests.planning.test_layouts import GUIDE

TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
EP, ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
SP, VPP = "--sequence-parallel", "--num-layers-per-virtual-pipeline-stage"


QUICK = (("nano", 16), ("mini", 64), ("large", 512))
RECOMMENDED_CASES = [
    pytest.param(x, id=x.name, marks=[pytest.mark.slow] * ((x.preset, x.world_size) not in QUICK))
    for x in RECOMMENDED
]


@pytest.mark.parametrize("layout", RECOMMENDED_CASES)
def test_recommended_layouts(layout: Layout) -> None:
    """First and last rank of each stage: first and last of its data, expert and tensor groups."""
    args = parse_layout(layout.preset, layout.world_size, layout.flags)
    check = LayoutCheck(args)
    for rank in sample_ranks(args, per_stage=2):
        check.add(build_rank(args, rank))
    assert check.problems() == []
    assert check.parameters() == PRESETS[layout.preset].total
    stages = check.stages()
    assert [stage.number for stage in stages] == list(range(args.pipeline_model_parallel_size))
    assert max(abs(stage.share - 1) for stage in stages) <= BALANCE
    assert sum(stage.share for stage in stages) == pytest.approx(len(stages))
    assert summary_row(layout.preset, check) in GUIDE.read_text()


@pytest.mark.parametrize(("preset", "world_size"), first(1, (QUICK[1], QUICK[0], QUICK[2])))
def test_eight_ranks_of_each_stage_hold_the_whole_model(preset: str, world_size: int) -> None:
    """With EP 8: each expert once, the rest eight times, nothing left out."""
    args = parse_layout(preset, world_size, recommended(preset, world_size).flags)
    ranks = [rank for stage in stage_ranks(args) for rank in stage[:8]]
    built = [build_rank(args, rank) for rank in ranks]
    held = cover(Counter(box for rank in built for box in rank.boxes))
    assert {key: 1 if ".mlp.experts." in key else 8 for key in held} == {
        key: most for key, (fewest, most) in held.items() if fewest == most
    }
    whole = {box.key: box.whole for rank in built for box in rank.boxes}
    sizes = PRESETS[preset].sizes
    experts = "decoder.layers.{}.mlp.experts.experts.linear_fc1.weight"
    assert whole[experts.format(sizes.num_layers - 1)] == (
        sizes.num_experts,
        2 * sizes.moe_ffn_hidden_size,
        sizes.hidden_size,
    )
    assert whole["output_layer.weight"] == (sizes.vocab_size, sizes.hidden_size)
    # Every part is held by as many ranks as share its optimizer state, so this is the sum.
    assert sum(rank.dense for rank in built) == 8 * sum(rank.dense for rank in built[::8])
    total = sum(rank.dense for rank in built[::8]) + sum(rank.expert for rank in built)
    assert total == PRESETS[preset].total


@pytest.mark.slow
def test_large_in_another_layout() -> None:
    """Tensor parallelism, experts split as well, and a vocabulary that has to be padded."""
    flags = (TP, "8", SP, PP, "4", EP, "8", ETP, "2", "--pipeline-model-parallel-layout")
    args = parse_layout("large", 512, (*flags, "Et*16|(t*15|)*2t*14L"))
    check = LayoutCheck(args)
    for rank in sample_ranks(args, per_stage=3):
        check.add(build_rank(args, rank))
    assert args.padded_vocab_size == 200704
    assert check.parameters() == PRESETS["large"].total + 2 * (200704 - 200192) * 3072
    assert check.problems() == []


EIGHT_RANKS = ("--micro-batch-size", "1", "--num-attention-heads", "8")
LAYOUTS = {
    "DP 8": (),
    "TP 2": (TP, "2", SP),
    "TP 4": (TP, "4", SP),
    "EP 8": (EP, "8"),
    "TP 2, EP 4, ETP 1": (TP, "2", SP, EP, "4", ETP, "1"),
    "EP 2, ETP 2": (TP, "2", SP, EP, "2", ETP, "2"),
    "TP 1, ETP 2": (EP, "2", ETP, "2"),
    "PP 2": (PP, "2", EP, "2"),
    "PP 2, VPP 2": (PP, "2", VPP, "1", EP, "2"),
    "PP 2 across nodes": (PP, "2", "--use-tp-pp-dp-mapping"),
    "TP 2, PP 2, EP 2": (TP, "2", SP, PP, "2", EP, "2", ETP, "1"),
}


def tiny(flags: tuple[str, ...]) -> Namespace:
    return parse_layout("tiny", 8, (*EIGHT_RANKS, *flags))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_together_holds_the_model(name: str) -> None:
    args = tiny(LAYOUTS[name])
    check = LayoutCheck(args)
    for rank in range(8):
        assert not check.is_complete
        built = build_rank(args, rank)
        assert built.rank == rank
        assert rank in stage_ranks(args)[built.stage]
        check.add(built)
    assert check.is_complete
    assert check.parameters() == check.expected
    # A model of 4 layers cannot balance; all the rest has to be right.
    assert [p for p in check.problems() if "mean stage's FLOPs" not in p] == []


def test_stages_of_ranks() -> None:
    neighbours = tiny(LAYOUTS["PP 2"])
    assert stage_ranks(neighbours) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sample_ranks(neighbours, 1) == [0, 4]
    assert sample_ranks(neighbours, 3) == [0, 2, 3, 4, 6, 7]
    assert sample_ranks(neighbours, 100) == list(range(8))
    across = tiny(LAYOUTS["PP 2 across nodes"])
    assert stage_ranks(across) != stage_ranks(neighbours)


def test_copies_are_counted_once() -> None:
    args = tiny(LAYOUTS["TP 2"])
    built = build_rank(args, 5)
    # 4 ranks have the same half of a matrix, 8 the same gains and routers.
    gains = 4 * (4 * 192 + 2 * 32) + 192
    copied = gains + 3 * 8 * 192
    assert built.unique == Fraction(built.dense + built.expert - copied, 4) + Fraction(copied, 8)


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("RANK", raising=False)
    args = tiny(LAYOUTS["EP 8"])
    assert args.world_size == 8
    build_rank(args, 7)
    assert os.environ["WORLD_SIZE"] == "3"
    assert "RANK" not in os.environ
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


def test_a_rank_that_does_not_build_is_named() -> None:
    args = tiny(LAYOUTS["TP 2"])
    args.num_attention_heads = 7
    with pytest.raises(TrinityError) as failed:
        build_rank(args, 3)
    assert str(failed.value).startswith("rank 3 does not build: num_attention_heads (7)")
    assert "\n" not in str(failed.value)
    assert not dist.is_initialized()


def test_what_the_trainer_refuses_is_refused() -> None:
    with pytest.raises(UsageError) as refused:
        parse_layout("large", 2048, (EP, "7"))
    assert "--expert-model-parallel-size 7" in str(refused.value)
