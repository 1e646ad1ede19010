"""A rank's new weights go into the buffers as upstream copies them, in fewer launches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_trinity.planning.costs.operations import OperationCounter
from megatron_trinity.planning.costs.places import Places

COPY: Any = DistributedOptimizer._copy_main_params_to_model_params


def optimizer(**layout: bool) -> Any:
    """Two groups of matrices in bf16, one of them split over two buckets, and one gain in fp32."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"bf16": [[6, 10], [4]], "fp32": [[5]]}
    groups = {kind: [[torch.empty(n) for n in part] for part in of] for kind, of in sizes.items()}
    places = {}
    for kind, buffer in (("bf16", 0), ("fp32", 1)):
        for bucket, part in enumerate(groups[kind]):
            start = 3  # another rank's part is ahead of it
            for parameter in part:
                places[parameter] = (buffer, bucket, slice(start, start + parameter.numel()))
                start += parameter.numel()
    buckets = {0: (torch.bfloat16, [24, 12]), 1: (torch.float32, [9])}

    def range_map(parameter: Any) -> dict[str, Any]:
        part = places[parameter][2]
        size = part.stop - part.start
        return {"gbuf_world_in_bucket": SimpleNamespace(start=part.start, end=part.stop, size=size)}

    def masters(kind: str) -> list[list[Any]]:
        return [[torch.randn(p.shape, generator=generator) for p in of] for of in groups[kind]]

    flags = ("use_megatron_fsdp", "fp8_param_gather", "fp4_param_gather")
    return SimpleNamespace(
        is_stub_optimizer=False,
        ddp_config=SimpleNamespace(**{**dict.fromkeys(flags, False), **layout}),
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False),
        shard_fp32_from_float16_groups=masters("bf16"),
        shard_fp32_groups=masters("fp32"),
        model_float16_groups=groups["bf16"],
        model_fp32_groups=groups["fp32"],
        _get_model_param_range_map=range_map,
        _is_distopt_quantized_param=lambda parameter: False,
        model_param_gbuf_map={p: (b, None, bucket) for p, (b, bucket, _) in places.items()},
        buffers=[
            SimpleNamespace(
                buckets=[SimpleNamespace(param_data=torch.zeros(n, dtype=dtype)) for n in lengths]
            )
            for dtype, lengths in buckets.values()
        ],
    )


def written(made: Any) -> list[Any]:
    return [bucket.param_data for buffer in made.buffers for bucket in buffer.buckets]


def test_they_are_upstreams_in_a_launch_for_each_dtype() -> None:
    ours, theirs = optimizer(), optimizer()
    with OperationCounter(Places("all")) as counter:
        COPY(ours)
    COPY.__wrapped__(theirs)
    for got, expected in zip(written(ours), written(theirs), strict=True):
        assert expected.any()
        assert torch.equal(got, expected)
    assert counter.launches == {("all", "_foreach_copy_"): 2}


def test_what_is_quantized_is_left_to_upstream() -> None:
    class Left(Exception):
        pass

    made = optimizer(fp8_param_gather=True)

    def quantized() -> None:
        raise Left

    made._get_fp8_params_and_shard_fp32_from_fp8 = quantized
    with pytest.raises(Left):
        COPY(made)
