"""Bytes that are worked out of a rank's state, and those of the real model and optimizer."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_trinity.planning.fake_ranks import fake_groups, parse_for_ranks, parse_layout
from megatron_trinity.planning.layouts import RECOMMENDED, Layout
from megatron_trinity.planning.stages import stage_chunks
from megatron_trinity.planning.state import StageState, StateBytes, is_sharded
from megatron_trinity.training.planned import state_bytes
from tests.distributed import layouts
from tests.distributed.layouts import GLOBAL_BATCH, HEADS, LAYOUTS, QUERY_GROUPS, QUICK
from tests.trinity import afmoe_config

BF16 = ("--bf16",)
PRECISIONS = {"fp32": (), "bf16": BF16, "bf16 gradients": (*BF16, "--grad-reduce-in-bf16")}
MUON = ("--optimizer", "muon")
RATES = ("--lr", "1e-3", "--adamw-lr", "1e-3", "--train-iters", "1")


def tiny(layout: layouts.Layout, *flags: str) -> Namespace:
    from megatron_trinity.checkpoint.hf.config import flags_from_hf_config

    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": QUERY_GROUPS, "head_dim": 8}
    config = afmoe_config(num_hidden_layers=4, sliding_window=8, **sizes)
    run = ("--seq-length", "32", "--micro-batch-size", "2", "--optimizer", "adam", *RATES)
    batch = ("--global-batch-size", str(GLOBAL_BATCH))
    words = (*flags_from_hf_config(config), *run, *batch, *layouts.flags(layout), *flags)
    return parse_for_ranks(layouts.ranks_of(layout), words)


def built(args: Namespace, rank: int, device: str) -> tuple[StateBytes, StateBytes]:
    """Worked out, and of the real model in Megatron's buffers with the real optimizer."""
    with fake_groups(args, rank) as groups, on(device):
        stage = StageState(args, groups.pp.rank(), stage_chunks(args)[groups.pp.rank()])
        numbers = (groups.intra_dp_cp.rank(), groups.intra_expt_dp.rank())
        expected = stage.of_rank(*(numbers if is_sharded(args) else (0, 0)))
        chunks = wrapped(args, groups, device)
        return expected, state_bytes(chunks, built_optimizer(args, chunks))


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    with mock.patch.object(torch.cuda, "current_device", return_value=torch.device(device)):
        yield


def wrapped(args: Namespace, groups: Any, device: str) -> list[Any]:
    """The rank's chunks as training makes them."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import (
        set_defaults_if_not_set_tensor_model_parallel_attributes,
    )
    from megatron.core.transformer.module import Float16Module
    from megatron.training.training import get_megatron_ddp_config

    from megatron_trinity.optimizer.layout import mark_parameters, parameter_layout
    from megatron_trinity.optimizer.param_groups import groups_from_args
    from megatron_trinity.planning.buffers import bucket_sizes
    from megatron_trinity.planning.fake_ranks import build_chunks

    chunks = build_chunks(args, groups)
    if device == "cpu":
        for chunk in chunks:
            marks = [dict(parameter.__dict__) for parameter in chunk.parameters()]
            chunk.to_empty(device=device)  # which forgets Megatron's marks
            for parameter, of in zip(chunk.parameters(), marks, strict=True):
                parameter.__dict__.update(of)
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    sizes = bucket_sizes(args, chunks, groups)
    make: Any = DistributedOptimizer.compute_full_param_layout
    if args.use_layer_wise_distributed_optimizer:
        mark_parameters(groups_from_args(args), chunks)
        make = parameter_layout
    if args.bf16:
        chunks = [Float16Module(chunk.config, chunk) for chunk in chunks]
    config = get_megatron_ddp_config(args)
    config.use_distributed_optimizer = is_sharded(args)
    ranks = groups.intra_dp_cp.size(), groups.intra_expt_dp.size()
    found = []
    for chunk, size in zip(chunks, sizes, strict=True):
        layout = make(list(chunk.parameters()), size, ranks[0], config, ranks[1])
        found.append(
            DistributedDataParallel(
                config=chunk.config,
                ddp_config=config,
                module=chunk,
                disable_bucketing=size is None,
                pg_collection=groups,
                full_param_layout=layout if is_sharded(args) else None,
            )
        )
    return found


def built_optimizer(args: Namespace, chunks: list[Any]) -> Any:
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_trinity.optimizer.optimizer import TrinityOptimizer
    from megatron_trinity.optimizer.param_groups import groups_from_args

    config, overrides = get_megatron_optimizer_config(args)
    config.timers = None
    if args.optimizer == "muon":
        adamw = partial(torch.optim.AdamW)
        with (
            # Plans ask tensor-parallel ranks, which are not there, and make no state.
            mock.patch.object(TrinityOptimizer, "_planned_muon", return_value=None),
            mock.patch.object(torch.optim, "AdamW", lambda *a, **k: adamw(*a, **{**k, "fused": 0})),
            mock.patch("megatron_trinity.optimizer.optimizer.find_owners"),
        ):
            return TrinityOptimizer(config, chunks, groups_from_args(args))
    optimizer = get_megatron_optimizer(
        config, chunks, config_overrides=overrides, use_gloo_process_groups=False
    )
    for group in optimizer.param_groups:
        group["lr"] = args.lr
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


CASES = [
    pytest.param(layout, precision, id=f"{' + '.join(layout)}, {precision}", marks=marks)
    for number, layout in enumerate(LAYOUTS)
    for precision in [list(PRECISIONS)[number % len(PRECISIONS)]]
    for marks in [[pytest.mark.slow] * (layout not in QUICK)]
]
"""Every layout, in one precision after the other."""


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_every_layout(layout: layouts.Layout, precision: str) -> None:
    """The first rank and the last, with the layout's own optimizer and with Muon."""
    for optimizer in ((), MUON):
        if "muon" in layout and optimizer:
            continue
        args = tiny(layout, *PRECISIONS[precision], *optimizer)
        for rank in {0, args.world_size - 1}:
            expected, real = built(args, rank, "cpu")
            assert expected == real


LARGE = [layout for layout in RECOMMENDED if layout.name == "large on 2048"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LARGE, ids=lambda layout: layout.name)
def test_every_stage_of_large(layout: Layout) -> None:
    """Its first rank and its last; what stages hold over all ranks is told by `test_fake_ranks`."""
    args = parse_layout(layout.preset, layout.world_size, layout.flags)
    per_stage = args.world_size // args.pipeline_model_parallel_size
    for stage in range(args.pipeline_model_parallel_size):
        for rank in (stage * per_stage, (stage + 1) * per_stage - 1):
            expected, real = built(args, rank, "meta")
            assert expected == real
            assert expected.padding < 0.03 * (expected.weights + expected.gradients)
