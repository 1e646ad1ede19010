"""Layers of each stage from arguments alone, without a process group, against built ranks."""

from __future__ import annotations

import pytest

from megatron_trinity.planning.fake_ranks import build_rank, parse_layout, stage_ranks
from megatron_trinity.planning.layouts import recommended
from megatron_trinity.planning.stages import stage_chunks

PP, VPP = "--pipeline-model-parallel-size", "--num-layers-per-virtual-pipeline-stage"
LAYOUT = "--pipeline-model-parallel-layout"
CASES = {
    "one stage": (),
    "stages": (PP, "2"),
    "virtual": (PP, "2", VPP, "1"),
    "layout": (PP, "2", LAYOUT, "Et|tt|t|L"),
    "uneven": (PP, "2", "--decoder-first-pipeline-num-layers", "1"),
    "last": (PP, "2", "--decoder-last-pipeline-num-layers", "1"),
    "loss counts": (
        *(PP, "3", "--account-for-loss-in-pipeline-split", "--num-layers", "7"),
        "--account-for-embedding-in-pipeline-split",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_stages_are_those_that_are_built(name: str) -> None:
    flags = ("--micro-batch-size", "1", "--global-batch-size", "12", *CASES[name])
    world_size = 3 if "3" in CASES[name] else 2
    args = parse_layout("tiny", world_size, flags)
    chunks = stage_chunks(args)
    for stage, [rank, *_] in enumerate(stage_ranks(args)):
        assert build_rank(args, rank).chunks == chunks[stage]


def test_chunks_of_large() -> None:
    args = parse_layout("large", 512, recommended("large", 512).flags)
    [first, *_, last] = stage_chunks(args)
    assert [[n for n, _ in chunk.layers] for chunk in first] == [[0, 1, 2, 3], [32, 33, 34, 35]]
    assert [[n for n, _ in chunk.layers] for chunk in last] == [[28, 29, 30, 31], [59]]
    assert [chunk.has_lm_head for chunk in last] == [False, True]
    assert [chunk.has_embedding for chunk in first] == [True, False]
