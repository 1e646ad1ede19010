"""Orders that a seed decides: every token once an epoch, every draw of a blend once."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_trinity.data.blend import BLOCK, Blend
from megatron_trinity.data.packing import OnePass, Packing, SequentialPacking
from megatron_trinity.data.permutation import Permutation, shuffled
from megatron_trinity.data.stream import Phase, Stream
from megatron_trinity.errors import TrinityError

LENGTHS = np.array([0, 5, 16, 17, 1, 40, 0, 3, 8, 2, 1, 29, 0], dtype=np.int32)
TOKENS = int(LENGTHS.sum())

Token = tuple[int, int]

ORDER = [3, 6, 2, 1, 4, 7, 0, 5]
PLACES = [57, 557, 290, 681, 461, 611]
DRAWS = [(0, 19), (0, 1170), (0, 1487), (2, 14), (0, 1829), (0, 809)]


def row(packing: Packing, sample: int) -> list[Token]:
    """Document and place of each token."""
    pieces = packing.pieces(sample)
    assert all(piece.length > 0 for piece in pieces)
    return [(p.document, p.start + n) for p in pieces for n in range(p.length)]


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000])
def test_a_permutation_has_each_number_once(size: int) -> None:
    first, other = ([Permutation(size, key)[i] for i in range(size)] for key in "ab")
    assert sorted(first) == sorted(other) == list(range(size))
    assert size < 16 or (first != other and first != sorted(first))
    with pytest.raises(IndexError):
        Permutation(size, "a")[size]


def test_orders_are_those_of_today() -> None:
    """A run that goes on with a later version has to read what it would have read."""
    assert shuffled(8, "documents", 1234, 0).tolist() == ORDER
    assert [Permutation(1000, "samples", 1234, 0)[n] for n in range(6)] == PLACES
    blend = Blend([0.5, 0.25, 0.25], None, 1234, 0)
    assert [blend[n] for n in range(6)] == DRAWS


@pytest.mark.parametrize("seq_length", [1, 2, 7, 16, TOKENS - 1, TOKENS, TOKENS + 1, 3 * TOKENS])
def test_each_token_is_predicted_once_an_epoch(seq_length: int) -> None:
    """All documents of each epoch one behind the other, and every token but the first predicted."""
    epochs = 3 + 3 * (seq_length // TOKENS)
    stream = [
        (document, place)
        for epoch in range(epochs + 3)
        for document in shuffled(len(LENGTHS), "documents", 3, epoch).tolist()
        for place in range(LENGTHS[document])
    ]
    samples = -(-epochs * TOKENS // seq_length)
    packing = SequentialPacking(LENGTHS, seq_length, 3)
    rows = [row(packing, number) for number in range(samples)]
    plain = [stream[n * seq_length :][: seq_length + 1] for n in range(samples)]
    assert sorted(rows) == sorted(plain)
    seen = Counter(token for tokens in rows for token in tokens[1:])
    once = Counter(stream[1 : epochs * TOKENS])
    assert seen - once == Counter(stream[epochs * TOKENS : samples * seq_length + 1])
    assert not once - seen
    assert len(packing) == -(-TOKENS // seq_length)


def test_the_order_is_one_of_seed_and_epoch() -> None:
    first, same, other = (SequentialPacking(LENGTHS, 4, seed) for seed in (1, 1, 2))
    rows = [row(first, number) for number in range(60)]
    assert [row(same, number) for number in reversed(range(60))] == rows[::-1]
    assert [row(other, number) for number in range(60)] != rows
    assert rows[:30] != rows[30:60]


def test_one_pass_has_each_token_once_and_a_short_end() -> None:
    packing = OnePass(LENGTHS, 7)
    rows = [row(packing, number) for number in range(len(packing))]
    assert len(rows) == -(-(TOKENS - 1) // 7)
    seen = Counter(token for tokens in rows for token in tokens[1:])
    assert set(seen.values()) == {1}
    assert len(seen) == TOKENS - 1
    assert [len(tokens) for tokens in rows[:-1]] == [8] * (len(rows) - 1)


def reversed_bits(number: int) -> Fraction:
    return Fraction(int(f"{number:062b}"[::-1], 2), 2**62)


def drawn(weights: list[float], samples: int) -> list[int]:
    """The blend by its definition: in whose share each point lies."""
    total = sum(Fraction(weight) for weight in weights)
    counts = [0] * len(weights)
    for number in range(samples):
        point, source = reversed_bits(number), 0
        while point >= Fraction(weights[source]) / total:
            point -= Fraction(weights[source]) / total
            source += 1
        counts[source] += 1
    return counts


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.25, 0.25], [0.7, 0.3, 1e-9, 1e-3]])
@pytest.mark.parametrize("length", [None, BLOCK + 100])
def test_a_blend_draws_each_sample_of_a_source_once(
    weights: list[float], length: int | None
) -> None:
    blend = Blend(weights, length, 5)
    seen: list[list[int]] = [[] for _ in weights]
    for number in range(BLOCK + 100):
        source, index = blend[number]
        seen[source].append(index)
        if number % 500 == 0:
            assert blend.given(number + 1).tolist() == [len(of) for of in seen]
    complete = BLOCK + 100 if length else BLOCK
    counts = drawn(weights, complete)
    for source, count in enumerate(counts):
        assert sorted(index for index in seen[source] if index < count) == list(range(count))
    if length:
        assert [len(of) for of in seen] == counts == blend.given(length).tolist()


def test_shares_hold_over_any_length() -> None:
    weights = np.random.default_rng(0).random(10_000)
    weights[7] = 1e-9 * weights.sum()
    blend = Blend(weights.tolist(), None, 0)
    for samples in (1, 100, 12_345_678, 10**12 + 1):
        expected = weights / weights.sum() * samples
        counts: NDArray[np.int64] = blend.given(samples)
        assert counts.sum() == samples
        assert np.abs(counts - expected).max() <= 2 + np.log2(samples)
    assert blend.given(10**12)[7] == pytest.approx(1000, abs=42)


def test_a_source_goes_on_where_the_phase_before_has_left_it() -> None:
    phases = [Phase(5000, {0: 1.0, 1: 1.0}), Phase(3000, {1: 1.0, 2: 2.0}), Phase(None, {0: 1.0})]
    stream = Stream(phases, 3, 1)
    seen: list[list[int]] = [[], [], []]
    for number in range(9000):
        source, index = stream[number]
        seen[source].append(index)
        if number in (4999, 7999, 8999):
            assert stream.given(number + 1).tolist() == [len(of) for of in seen]
            assert [sorted(of) for of in seen] == [list(range(len(of))) for of in seen]
    assert [stream.phase_of(number) for number in (0, 4999, 5000, 7999, 8000)] == [0, 0, 1, 1, 2]
    with pytest.raises(TrinityError, match="the data ends with sample 8000"):
        Stream([*phases[:2]], 3, 1)[8000]
