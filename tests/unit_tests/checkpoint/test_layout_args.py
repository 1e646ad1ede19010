"""Layouts by their letters, judged as the trainer judges them."""

from __future__ import annotations

import pytest

from megatron_trinity.checkpoint.layout_args import (
    STORED,
    Layout,
    args_of_layout,
    layout_of,
    parse_layout_text,
    with_layout,
)
from megatron_trinity.errors import TrinityError, UsageError
from tests.checkpoints import model_args


@pytest.mark.parametrize(
    ("text", "expected", "ranks"),
    [
        ("tp=2", Layout({"tp": 2}), 2),
        ("tp=2, pp=3,ep=4,etp=1", Layout({"tp": 2, "pp": 3, "ep": 4, "etp": 1}), 12),
        ("tp=2,ep=2", Layout({"tp": 2, "ep": 2}), 4),  # etp is 2
        ("ep=4,cp=2,dp=6", Layout({"ep": 4, "cp": 2, "dp": 6}), 12),
        ("ep=6,cp=4", Layout({"ep": 6, "cp": 4}), 12),
        ("pp=2,stages=Et|tttL", Layout({"pp": 2}, "Et|tttL"), 2),
    ],
)
def test_what_a_text_says(text: str, expected: Layout, ranks: int) -> None:
    assert parse_layout_text(text) == expected
    assert expected.ranks == ranks


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tp=2,gpu=3", "'gpu=3' is no part of a layout; use tp=, pp=, vpp="),
        ("tp", "'tp' is no part"),
        ("", "'' is no part"),
        ("tp=", "'tp=' is no part"),
        ("tp=2,tp=2", "tp twice"),
        ("tp=0", "tp=0 has to be 1 or more"),
        ("tp=two", "tp=two has to be 1 or more"),
    ],
)
def test_texts_that_are_no_layout(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=named) as refused:
        parse_layout_text(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tp=3", "--num-query-groups 2 do not fit --tensor-model-parallel-size 3"),
        ("ep=3", "--num-experts 8 do not divide over --expert-model-parallel-size 3"),
        ("etp=5,tp=1", "--moe-ffn-hidden-size 48 does not divide"),
        ("tp=2,ep=4,dp=3", "6 ranks cannot be split into --expert-model-parallel-size 4"),
        ("cp=64", "--seq-length 64 cannot be cut"),
        ("pp=4", "Number of layers should be divisible"),
        ("pp=2,stages=Et|tL", "rank 0 does not build: "),
    ],
)
def test_layouts_that_the_model_cannot_have(text: str, named: str) -> None:
    with pytest.raises(TrinityError, match=named) as refused:
        args_of_layout(model_args(), parse_layout_text(text))
    assert str(refused.value).startswith("the model cannot have this layout: ")
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 1


def test_only_the_layout_of_arguments_changes() -> None:
    saved = model_args("--bf16", "--seed", "77", "--load-balancing", "smebu")
    args = args_of_layout(saved, parse_layout_text("tp=2,ep=4,etp=1,cp=2,dp=3"))
    changed = with_layout(saved, args)
    assert {
        name: getattr(changed, name)
        for name in vars(saved)
        if getattr(changed, name) != getattr(saved, name)
    } == {
        "tensor_model_parallel_size": 2,
        "tensor_parallel_num_weight_shards": 2,
        "expert_model_parallel_size": 4,
        "context_parallel_size": 2,
        "sequence_parallel": True,
        "data_parallel_size": 3,
        "world_size": 12,
    }
    assert saved.world_size == 1
    assert set(STORED) <= set(vars(saved))
    assert layout_of(changed) == Layout({"tp": 2, "pp": 1, "ep": 4, "etp": 1, "cp": 2, "dp": 3})
    assert args.padded_vocab_size == 256
    assert args.bf16
    assert args.load_balancing == "smebu"


def test_the_layout_of_a_run_with_virtual_stages() -> None:
    stages = args_of_layout(model_args(), parse_layout_text("pp=2,stages=Et|t|t|ttL"))
    assert layout_of(stages).stages == "Et|t|t|ttL"
    assert layout_of(stages).ranks == 2
    again = args_of_layout(model_args(), layout_of(stages))
    assert again.virtual_pipeline_model_parallel_size == 2
