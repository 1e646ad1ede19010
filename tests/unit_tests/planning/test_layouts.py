"""The recommended layouts: what the trainer takes, what they keep to, what the guide prints."""

from __future__ import annotations

import pytest

from megatron_trinity.errors import UsageError
from megatron_trinity.planning.fake_ranks import parse_layout
from megatron_trinity.planning.layouts import RECOMMENDED, Layout, recommended
from megatron_trinity.planning.sizes import ModelSizes
from tests.pages import recommended_layouts
from tests.paths import ROOT
from tests.unit_tests.planning.presets import PRESETS

GUIDE = ROOT / "docs" / "scale.md"
NODE = 8


def test_every_real_preset_has_a_small_and_a_large_layout() -> None:
    sizes = {name: [x.world_size for x in RECOMMENDED if x.preset == name] for name in PRESETS}
    assert sizes == {"nano": [16, 64, 512], "mini": [64, 512], "large": [512, 2048]}


@pytest.mark.parametrize("layout", RECOMMENDED, ids=lambda layout: layout.name)
def test_the_trainer_takes_it(layout: Layout) -> None:
    args = parse_layout(layout.preset, layout.world_size, layout.flags)
    assert ModelSizes.from_args(args) == PRESETS[layout.preset].sizes
    assert args.seq_length == PRESETS[layout.preset].seq_length
    assert args.world_size == layout.world_size
    # What --use-distributed-optimizer means for Muon.
    assert args.use_layer_wise_distributed_optimizer
    assert args.context_parallel_size == 1
    # Experts exchange tokens within a node: neighbouring ranks are on one.
    assert args.expert_model_parallel_size * args.expert_tensor_parallel_size <= NODE
    micro_batches = args.global_batch_size / (args.micro_batch_size * args.data_parallel_size)
    assert micro_batches % args.pipeline_model_parallel_size == 0
    assert micro_batches >= 4 * (args.pipeline_model_parallel_size - 1)


def test_a_row_is_found_by_preset_and_ranks() -> None:
    assert recommended("large", 2048) is RECOMMENDED[-1]
    with pytest.raises(UsageError) as unknown:
        recommended("large", 2047)
    message = str(unknown.value)
    assert message.startswith("no layout is recommended for large on 2047 ranks (there are: nano")
    assert "\n" not in message


def test_the_guide_prints_the_table() -> None:
    assert recommended_layouts() in GUIDE.read_text()
    assert len(recommended_layouts().splitlines()) == 2 + len(RECOMMENDED)
