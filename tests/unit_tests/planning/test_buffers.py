"""At every recommended layout next to nothing of the buffers is padding."""

from __future__ import annotations

import pytest

from megatron_trinity.planning.fake_ranks import build_chunks, fake_groups, parse_layout
from megatron_trinity.planning.layouts import recommended

CASES = [("large", 2048), ("nano", 512), ("mini", 64), ("nano", 16), ("mini", 512), ("large", 512)]
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "world_size"), CASES)
def test_padding_is_less_than_three_percent(preset: str, world_size: int) -> None:
    """Of a rank of the first and of the last stage, with one bucket a buffer and with many."""
    from megatron_trinity.planning.buffers import buffers_of_rank

    layout = recommended(preset, world_size)
    for flags in ((), OVERLAP):
        args = parse_layout(preset, world_size, (*layout.flags, *flags))
        stages = args.pipeline_model_parallel_size
        for rank in {0, world_size - world_size // stages}:
            with fake_groups(args, rank) as groups:
                built = buffers_of_rank(args, build_chunks(args, groups), groups)
            assert 0 <= built.padding < 0.03
