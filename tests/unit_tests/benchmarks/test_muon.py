"""What the benchmark of Muon gives each side, and how it counts."""

from __future__ import annotations

import pytest
import torch

from benchmarks.muon import NANO, Case, matrix_rows, rows

CASE = Case("nano", NANO, experts_only=False)


def test_a_layer_of_nano_has_its_shapes() -> None:
    shapes = CASE.shapes(layers=2)
    experts = [shape for name, shape in shapes.items() if "experts.experts" in name]
    assert experts.count((512, 1024)) == experts.count((1024, 256)) == 2 * 16
    assert shapes["decoder.layers.1.self_attention.linear_qkv.weight"] == (2560, 1024)
    assert shapes["decoder.layers.0.self_attention.linear_proj.weight"] == (1024, 1024)
    assert shapes["decoder.layers.0.mlp.router.weight"] == (128, 1024)
    assert len(shapes) == 2 * (2 * 16 + 5)


def test_torch_gets_the_matrices_of_hugging_face() -> None:
    whole = torch.randn(2560, 16)
    grouped = whole.unflatten(0, (2, -1)).split([512, 512, 128, 128], dim=1)
    found = matrix_rows(CASE, "decoder.layers.0.self_attention.linear_qkv.weight")
    for got, expected in zip(found, grouped, strict=True):
        assert torch.equal(torch.cat([whole[part] for part in got]), expected.flatten(0, 1))
    fc1 = matrix_rows(CASE, "decoder.layers.0.mlp.experts.experts.linear_fc1.weight 3")
    assert fc1 == [[slice(0, 256)], [slice(256, 512)]]


def test_a_ratio_above_one_is_in_our_favour() -> None:
    found = rows(CASE, "ms", {"ours": 2.0, "megatron": 6.0, "torch": 1.0})
    assert [row["ratio"] for row in found] == pytest.approx([3.0, 0.5])
    assert [row["case"] for row in rows(CASE, "ms", {"ours": 1.0, "megatron": 1.0})] == [
        "nano, ms, against TensorParallelMuon"
    ]
