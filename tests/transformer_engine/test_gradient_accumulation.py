"""Gradients straight into their buffers by Transformer Engine, without Apex: the LM head's too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.pool import RankPools
from tests.steps import recorded, run_recorded
from tests.trainer import training_flags, write_dataset
from tests.transformer_engine.models import TE


def added(rank: int, world_size: int, dtype: str) -> tuple[bool, float, float]:
    """What the head's kernel adds to an fp32 buffer, against fp64; and without the buffer."""
    import torch
    from megatron.core.tensor_parallel import layers

    generator = torch.Generator().manual_seed(3)
    inputs, of_output = (
        torch.randn(24, width, generator=generator).to(getattr(torch, dtype)) for width in (16, 12)
    )
    held = torch.randn(12, 16, generator=generator)
    buffer = held.clone()
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, of_output, buffer[:12])
    product = of_output.double().t() @ inputs.double()
    error = (buffer.double() - held.double() - product).norm() / product.norm()
    rounded = (product.to(getattr(torch, dtype)).double() - product).norm() / product.norm()
    return layers._grad_accum_fusion_available, float(error), float(rounded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_added_in_fp32(te_ranks: RankPools, dtype: str) -> None:
    [(available, error, rounded)] = te_ranks.run(added, dtype, world_size=1)
    assert available
    assert error <= 1e-6
    if dtype == "bfloat16":
        assert rounded > 1e-4, "a gradient of its own would be rounded"


def steps(
    rank: int, world_size: int, flags: list[str], file: Path, fused: bool
) -> tuple[int, int, bool]:
    """Exit code, and how often a gradient went into a buffer, ahead of the head's."""
    from unittest import mock

    from megatron.core.tensor_parallel import layers

    from megatron_trinity.arguments import parse
    from megatron_trinity.upstream.gradient_accumulation import add_product

    kernels = mock.Mock(
        wgrad_gemm_accum_fp32=mock.Mock(side_effect=add_product),
    )
    cpu = parse.set_cpu_defaults

    def defaults(parser: object) -> object:
        found = cpu(parser)  # type: ignore[arg-type]
        found.set_defaults(gradient_accumulation_fusion=fused)
        return found

    with (
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", kernels),
        mock.patch.object(parse, "set_cpu_defaults", defaults),
    ):
        code = run_recorded(rank, world_size, flags, file)
    shapes = {tuple(call.args[2].shape) for call in kernels.wgrad_gemm_accum_fp32.call_args_list}
    return code, len(kernels.wgrad_gemm_accum_fp32.call_args_list), (160, 64) in shapes


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=["fp32", "bf16"])
def test_a_run_is_the_same(te_ranks: RankPools, tmp_path: Path, precision: tuple[str, ...]) -> None:
    write_dataset(tmp_path / "data")
    words = training_flags(
        tmp_path / "data", "--train-iters", "3", "--optimizer", "adam", *precision, *TE
    )
    found = {}
    for fused in (False, True):
        file = tmp_path / str(fused)
        [(code, calls, of_head)] = te_ranks.run(steps, words, file, fused, world_size=1)
        assert code == 0
        assert (calls > 0) == of_head == fused
        found[fused] = [
            [float.fromhex(value) for value in values.replace(",", " ").split()]
            for _, values in recorded(file)
        ]
    assert len(found[True]) == 3
    tolerance = 1e-2 if precision else 1e-6
    for one, two in zip(found[False], found[True], strict=True):
        assert one == pytest.approx(two, rel=tolerance)
