"""Where the Hugging Face matrices stand in a parameter, for every tensor-parallel size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_trinity.errors import TrinityError
from megatron_trinity.optimizer.matrices import Piece, parts, pieces

HEADS, GROUPS, HEAD, HIDDEN = 8, 2, 4, 6
QKV_KEY = "decoder.layers.0.self_attention.linear_qkv.weight"
FC1_KEY = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"


def model_config(**changes: Any) -> Any:
    values = {
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "kv_channels": HEAD,
        "attention_output_gate": True,
        "gated_linear_unit": True,
    }
    return SimpleNamespace(**(values | changes))


def assembled(held: list[tuple[Tensor, list[Piece]]]) -> dict[str, Tensor]:
    """Part name to the matrix that the pieces of all ranks make up; each value exactly once."""
    matrices: dict[str, Tensor] = {}
    for parameter, found in held:
        for piece in found:
            matrix = matrices.setdefault(piece.part, torch.full(piece.shape, torch.nan))
            height = piece.rows[1] - piece.rows[0]
            place = matrix[piece.row : piece.row + height]
            place = place[:, piece.column : piece.column + piece.columns]
            assert place.isnan().all()
            place.copy_(parameter[piece.rows[0] : piece.rows[1]])
    assert not any(matrix.isnan().any() for matrix in matrices.values())
    return matrices


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_queries_gate_keys_and_values_are_those_of_hugging_face(ranks: int) -> None:
    rows = 2 * (HEADS + GROUPS) * HEAD
    whole = torch.randn(rows, HIDDEN)
    held = []
    for rank, rows_of_rank in enumerate(whole.chunk(ranks)):
        parameter = rows_of_rank.clone()  # at 4 and 8 ranks a query group spans several
        tensor = ShardedTensor.from_rank_offsets(QKV_KEY, parameter, (0, rank, ranks))
        held.append((parameter, pieces(parameter, [tensor], model_config())))
    # Megatron interleaves by query group: its query heads, its gate heads, its key, its value.
    query = HEADS // GROUPS * HEAD
    grouped = whole.unflatten(0, (GROUPS, -1)).split([query, query, HEAD, HEAD], dim=1)
    names = ("query", "gate", "key", "value")
    expected = {name: part.flatten(0, 1) for name, part in zip(names, grouped, strict=True)}
    got = assembled(held)
    assert got.keys() == expected.keys()
    for name, matrix in expected.items():
        assert torch.equal(got[name], matrix), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gate_and_up_of_an_expert_are_those_of_hugging_face(ranks: int) -> None:
    whole = torch.randn(16, HIDDEN)
    gate, up = whole.chunk(2)
    held = []
    for rank in range(ranks):
        # A rank has its rows of the gate, then its rows of the up projection.
        parameter = torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
        tensors = [
            ShardedTensor.from_rank_offsets(
                FC1_KEY, half, (0, 3, 5), (1, number * ranks + rank, 2 * ranks), prepend_axis_num=1
            )
            for number, half in enumerate(parameter.chunk(2))
        ]
        found = pieces(parameter, tensors, model_config())
        assert {piece.index for piece in found} == {(3,)}
        held.append((parameter, found))
    got = assembled(held)
    assert torch.equal(got["gate"], gate)
    assert torch.equal(got["up"], up)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_row_parallel_matrix_is_cut_by_columns(ranks: int) -> None:
    whole = torch.randn(5, 8)
    held = []
    for rank, columns in enumerate(whole.chunk(ranks, dim=1)):
        parameter = columns.clone()
        tensor = ShardedTensor.from_rank_offsets(
            "decoder.layers.0.mlp.linear_fc2.weight", parameter, (1, rank, ranks)
        )
        held.append((parameter, pieces(parameter, [tensor], model_config())))
    assert torch.equal(assembled(held)[""], whole)


def test_rows_that_are_not_the_models_are_an_error() -> None:
    with pytest.raises(TrinityError, match=r"linear_qkv\.weight has 79 rows; 2 query groups"):
        parts(QKV_KEY, 79, model_config())
    with pytest.raises(TrinityError, match=r"linear_qkv\.weight has 80 rows"):
        parts(QKV_KEY, 80, model_config(attention_output_gate=False))
    with pytest.raises(TrinityError, match="no gate and up projection"):
        parts(FC1_KEY, 15, model_config())
    with pytest.raises(TrinityError, match="no gate and up projection"):
        parts(FC1_KEY, 16, model_config(gated_linear_unit=False))
