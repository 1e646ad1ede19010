"""Norms and differences of checkpoints, against those of whole tensors in fp64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_trinity.checkpoint.statistics import (
    SLICE_SHARE,
    TensorDifference,
    compare,
    tensor_statistics,
)
from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint
from tests.checkpoints import model_args, model_tensors, write_checkpoint

MEMORIES = [SLICE_SHARE * 5000, 2**30]  # slices of some rows, or whole tensors
A, B, C = (
    "decoder.final_layernorm.weight",
    "output_layer.weight",
    "embedding.word_embeddings.weight",
)


def opened(path: Path) -> tuple[TorchDistCheckpoint, TorchDistCheckpoint]:
    return TorchDistCheckpoint(path / "a"), TorchDistCheckpoint(path / "b")


def some_tensors() -> dict[str, Tensor]:
    """A vector, matrices of two dtypes, a stack of experts, and their state."""
    tensors = model_tensors(dtype=torch.bfloat16)
    chosen = (A, "decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.2.mlp.experts")
    return {key: value for key, value in tensors.items() if any(c in key for c in chosen)}


@pytest.mark.parametrize("memory", MEMORIES)
def test_statistics_are_those_of_whole_tensors(tmp_path: Path, memory: int) -> None:
    tensors = some_tensors()
    write_checkpoint(tmp_path, tensors, model_args())
    found = tensor_statistics(TorchDistCheckpoint(tmp_path), memory)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].norm == pytest.approx(tensor.double().norm().item(), rel=1e-12), key
        assert found[key].largest == tensor.abs().max().item(), key
        assert found[key].nonfinite == 0


@pytest.mark.parametrize("memory", MEMORIES)
def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path: Path, memory: int) -> None:
    tensor = torch.full((20, 64), 2.0)
    tensor[3, 4], tensor[3, 5], tensor[19, 63], tensor[0, 0] = math.nan, math.inf, -math.inf, -7
    write_checkpoint(tmp_path, {B: tensor}, model_args())
    [found] = tensor_statistics(TorchDistCheckpoint(tmp_path), memory).values()
    assert found.nonfinite == 3
    assert found.largest == 7
    assert found.norm == pytest.approx(math.sqrt(4 * (20 * 64 - 4) + 49), rel=1e-12)


@pytest.mark.parametrize("memory", MEMORIES)
def test_other_files_and_chunks_are_no_difference(tmp_path: Path, memory: int) -> None:
    tensors = some_tensors()
    tensors[A][3] = math.nan
    write_checkpoint(tmp_path / "a", tensors, model_args())
    write_checkpoint(tmp_path / "b", tensors, model_args(), files=5, max_bytes=900)
    found = compare(*opened(tmp_path), memory)
    assert not found.tensors_differ
    assert found.same == len(tensors)
    assert found.args == {}


@pytest.mark.parametrize("memory", MEMORIES)
def test_differences_are_those_of_whole_tensors(tmp_path: Path, memory: int) -> None:
    first = {
        A: torch.ones(64),
        B: torch.randn(160, 64),
        C: torch.randn(160, 64),
        "only.a": torch.ones(2),
    }
    second = {A: torch.ones(64), B: first[B].clone(), C: first[C].clone(), "only.b": torch.ones(2)}
    first[B][150, 3], second[B][150, 3] = 8.0, 1e-8  # their difference has no form in fp32
    second[B][1, 3] -= 0.25
    second[C][2, 2] = math.nan
    write_checkpoint(tmp_path / "a", first, model_args("--seed", "5"))
    write_checkpoint(tmp_path / "b", second, model_args("--seed", "6"), files=3)
    found = compare(*opened(tmp_path), memory)
    assert (found.only_first, found.only_second) == (["only.a"], ["only.b"])
    assert found.same == 1
    assert found.tensors.keys() == {B, C}
    difference = second[B].double() - first[B].double()
    assert found.tensors[B].largest == difference.abs().max().item()
    relative = (difference.norm() / first[B].double().norm()).item()
    assert found.tensors[B].relative == pytest.approx(relative, rel=1e-12)
    assert math.isnan(found.tensors[C].largest)
    assert math.isnan(found.tensors[C].relative)
    assert found.args["seed"] == (5, 6)
    assert found.tensors_differ


def test_other_shapes_and_dtypes(tmp_path: Path) -> None:
    exact = torch.randn(160, 64).bfloat16()
    write_checkpoint(tmp_path / "a", {B: exact, C: torch.ones(160, 64)}, model_args())
    write_checkpoint(tmp_path / "b", {B: exact.float(), C: torch.ones(128, 64)}, model_args())
    found = compare(*opened(tmp_path), 2**30)
    assert found.forms == {
        B: ("bfloat16 [160, 64]", "float32 [160, 64]"),
        C: ("float32 [160, 64]", "float32 [128, 64]"),
    }
    assert found.tensors == {}, "the values that can be compared are alike"
    assert found.same == 0


def test_a_difference_from_zeros(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", {A: torch.zeros(64)}, model_args())
    write_checkpoint(tmp_path / "b", {A: torch.ones(64)}, model_args())
    write_checkpoint(tmp_path / "c", {A: -torch.zeros(64)}, model_args())
    a, b, c = (TorchDistCheckpoint(tmp_path / name) for name in "abc")
    assert compare(a, b, 2**30).tensors == {A: TensorDifference(1.0, math.inf)}
    assert compare(a, c, 2**30).tensors == {A: TensorDifference(0.0, 0.0)}, "a bit differs"
