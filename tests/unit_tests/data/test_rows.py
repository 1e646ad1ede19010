"""Rows of whole documents: nothing cut that fits, every token once an epoch, tightly packed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_trinity.data.packing import Piece
from megatron_trinity.data.rows import Fit, RowPacking, best_fit, greedy
from megatron_trinity.errors import UsageError

SEQ_LENGTH = 8
LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any)
FITS = pytest.mark.parametrize("fit", [greedy, best_fit])


def packing(lengths: list[int], fit: Fit, seed: int = 3) -> RowPacking:
    return RowPacking(np.array(lengths, dtype=np.int32), SEQ_LENGTH, seed, fit=fit)


@FITS
@settings(max_examples=50, deadline=None)
@given(LENGTHS)
def test_an_epoch_predicts_every_token_once_and_cuts_nothing_that_fits(
    fit: Fit, lengths: list[int]
) -> None:
    rows = packing(lengths, fit)
    samples = [rows.pieces(index) for index in range(len(rows))]
    predicted: Counter = Counter()
    for pieces in samples:
        assert 0 < sum(piece.length for piece in pieces) <= SEQ_LENGTH + 1
        for piece in pieces:
            predicted.update((piece.document, piece.start + at) for at in range(1, piece.length))
            length = lengths[piece.document]
            assert piece.length == length or (piece.length <= SEQ_LENGTH + 1 < length)
    every = [(d, at) for d, length in enumerate(lengths) for at in range(1, length)]
    assert predicted == dict.fromkeys(every, 1)
    seen = {piece.document for pieces in samples for piece in pieces}
    assert seen == {d for d, length in enumerate(lengths) if length}


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each row, with all rows looked through for each document."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_best_fit_is_the_plain_one(lengths: list[int]) -> None:
    rows = best_fit(lengths, 9)
    filled = np.bincount(rows, weights=lengths)
    assert sorted(9 - int(tokens) for tokens in filled) == plain_best_fit(lengths, 9)


def test_greedy_keeps_the_order() -> None:
    assert greedy([5, 4, 1, 9, 3, 3, 3, 1], 9).tolist() == [0, 0, 1, 2, 3, 3, 3, 4]


@FITS
def test_epochs_differ_and_a_sample_depends_on_its_number_alone(fit: Fit) -> None:
    lengths = [3, 4, 5, 2, 7, 8, 1, 6] * 8
    one = packing(lengths, fit)
    forward = [one.pieces(index) for index in range(200)]
    size = len(one)
    assert {p.document for pieces in forward[:size] for p in pieces} == set(range(64))
    assert forward[:10] != forward[size : size + 10]
    other = packing(lengths, fit)
    assert [other.pieces(index) for index in reversed(range(200))] == forward[::-1]
    assert packing(lengths, fit, seed=4).pieces(0) != forward[0]


def test_a_long_document_goes_on_where_it_was_cut() -> None:
    rows = packing([20], best_fit)
    pieces = sorted((rows.pieces(n)[0] for n in range(len(rows))), key=lambda piece: piece.start)
    assert pieces == [Piece(0, 0, 9), Piece(0, 8, 9), Piece(0, 16, 4)]
    exact = packing([17], best_fit)
    assert len(exact) == 2  # nothing is left of it for a third


def test_nothing_to_pack() -> None:
    with pytest.raises(UsageError, match="all empty"):
        packing([0, 0], best_fit)
