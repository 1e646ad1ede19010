"""One model, one answer: weights, logits and training steps are the same in each layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_trinity.checkpoint.hf.config import flags_from_hf_config
from tests.crosses import first
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, parse

TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
EP, ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
VPP = "--num-layers-per-virtual-pipeline-stage"
# Name -> ranks and flags.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "TP 2, SP": (2, (TP, "2", "--sequence-parallel")),
    "TP 2, SP, ETP 1": (2, (TP, "2", ETP, "1", "--sequence-parallel")),
    "PP 2": (2, (PP, "2")),
    "PP 2, VPP 2": (2, (PP, "2", VPP, "1")),
    "EP 2": (2, (EP, "2")),
    "DP 2": (2, ()),
    "TP 4, with two KV heads": (4, (TP, "4", "--sequence-parallel")),
    "EP 2, ETP 2": (4, (TP, "2", EP, "2", ETP, "2", "--sequence-parallel")),
    "EP 2, ETP 2, TP 1": (4, (EP, "2", ETP, "2")),
    "TP 2, PP 2, EP 2": (4, (TP, "2", PP, "2", EP, "2", ETP, "1", "--sequence-parallel")),
    "PP 4": (4, (PP, "4")),
    "EP 4": (4, (EP, "4")),
}
CONFIG: dict[str, Any] = {"num_hidden_layers": 4}
LENGTH = 16


def stages(flags: tuple[str, ...]) -> list[Any]:
    """This rank's stages of the model, one a virtual stage."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_trinity.model.builder import TrinityModelBuilder
    from megatron_trinity.model.config import model_config_from_args

    args = parse(afmoe_config(**CONFIG), flags)
    virtual = args.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    # Another state of the generators on every rank: nothing may depend on it.
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed + torch.distributed.get_rank())
    builder = TrinityModelBuilder(model_config_from_args(args))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return [
        builder.build_model(groups, vp_stage=stage if virtual else None)
        for stage in range(virtual or 1)
    ]


def boxes(model: Any) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
    """Name, place in the whole tensor and values of each part of a stage."""
    from megatron_trinity.model.shards import model_shards

    for shard in model_shards(model):
        behind = zip(shard.offset[shard.leading_axes :], shard.data.shape, strict=True)
        place = [slice(i, i + 1) for i in shard.index]
        place += [slice(start, start + size) for start, size in behind]
        leading = (1,) * shard.leading_axes
        yield shard.key, tuple(place), shard.data.detach().reshape(*leading, *shard.data.shape)


def whole(rank: int, world_size: int) -> dict[str, Tensor]:
    from megatron_trinity.model.shards import whole_tensors

    return whole_tensors(stages(())[0])


def parts(
    rank: int, world_size: int, flags: tuple[str, ...], load: dict[str, Tensor] | None
) -> list[tuple[str, tuple[slice, ...], Tensor]]:
    from tests.trinity import load_whole_tensors

    models = stages(flags)
    if load is not None:
        for model in models:
            load_whole_tensors(model, load)
    return [(key, place, data.clone()) for model in models for key, place, data in boxes(model)]


@pytest.fixture(scope="module")
def single(ranks: RankPools) -> dict[str, Tensor]:
    [tensors] = ranks.run(whole, world_size=1)
    return tensors


def check_parts(
    ranks: RankPools, layout: str, expected: dict[str, Tensor], load: dict[str, Tensor] | None
) -> None:
    world_size, flags = LAYOUTS[layout]
    covered = {key: torch.zeros_like(tensor, dtype=torch.bool) for key, tensor in expected.items()}
    for of_rank in ranks.run(parts, flags, load, world_size=world_size):
        assert of_rank
        for key, place, data in of_rank:
            assert torch.equal(data, expected[key][place]), key
            covered[key][place] = True
    assert all(seen.all() for seen in covered.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_do_not_depend_on_the_layout(
    ranks: RankPools, single: dict[str, Tensor], layout: str
) -> None:
    check_parts(ranks, layout, single, None)


@pytest.mark.parametrize("layout", ["TP 2, SP", "EP 2", "PP 2, VPP 2", "EP 2, ETP 2"])
def test_whole_tensors_are_cut_for_the_layout(
    ranks: RankPools, single: dict[str, Tensor], layout: str
) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = {key: torch.randn(t.shape, generator=generator) for key, t in single.items()}
    check_parts(ranks, layout, tensors, tensors)


def logits(rank: int, world_size: int, flags: tuple[str, ...]) -> Tensor:
    """`[b, s, v]`, the same on every rank."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    [model] = stages(flags)
    ids = torch.randint(160, (2, LENGTH), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        out = model.eval()(ids, torch.arange(LENGTH).expand_as(ids), None)
        gathered: Tensor = gather_from_tensor_model_parallel_region(out)
    return gathered


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "PP" not in name])
def test_logits_do_not_depend_on_the_layout(ranks: RankPools, layout: str) -> None:
    [expected] = ranks.run(logits, (), world_size=1)
    assert expected.shape == (2, LENGTH, 160)
    assert expected.std() > 0.01
    world_size, flags = LAYOUTS[layout]
    for got in ranks.run(logits, flags, world_size=world_size):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def train(rank: int, world_size: int, save: Path, flags: tuple[str, ...]) -> None:
    """Two steps of the trainer itself, on random tokens."""
    from megatron_trinity.training.pretrain import pretrain

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    pretrain(
        [
            *flags_from_hf_config(afmoe_config(**CONFIG)),
            *("--micro-batch-size", "1", "--global-batch-size", "4", "--seq-length", "16"),
            *("--train-iters", "2", "--lr", "1e-3", "--lr-decay-style", "constant"),
            # A large epsilon: Adam's first steps would else be the signs of rounding errors.
            *("--optimizer", "adam", "--adam-eps", "1e-3"),
            *("--eval-iters", "0", "--eval-interval", "2", "--save-interval", "2"),
            *("--mock-data", "--num-workers", "0", "--tokenizer-type", "NullTokenizer"),
            *("--make-vocab-size-divisible-by", "1", "--save", str(save)),
            *flags,
        ]
    )


def saved(rank: int, world_size: int, path: Path) -> dict[str, Tensor]:
    from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint

    checkpoint = TorchDistCheckpoint(path)
    assert checkpoint.iteration == 2
    return {key: checkpoint.tensor(key) for key in checkpoint.model_keys()}


@pytest.fixture(scope="module")
def trained(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = tmp_path_factory.mktemp("single") / "checkpoints"
    ranks.run(train, path, (), world_size=1)
    [tensors] = ranks.run(saved, path, world_size=1)
    return tensors


@pytest.mark.parametrize(
    "layout", first(1, ["TP 2, PP 2, EP 2", "TP 2, SP", "PP 2", "PP 2, VPP 2", "EP 2", "DP 2"])
)
def test_two_steps_of_training_do_not_depend_on_the_layout(
    ranks: RankPools,
    single: dict[str, Tensor],
    trained: dict[str, Tensor],
    tmp_path: Path,
    layout: str,
) -> None:
    world_size, flags = LAYOUTS[layout]
    ranks.run(train, tmp_path, flags, world_size=world_size)
    [tensors] = ranks.run(saved, tmp_path, world_size=1)
    assert tensors.keys() == trained.keys() == single.keys()
    for key, tensor in tensors.items():
        update = (trained[key] - single[key]).norm()
        assert update > 0, key
        assert (tensor - trained[key]).norm() <= 1e-3 * update, key
