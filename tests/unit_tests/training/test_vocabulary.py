"""The tokenizer is there, and its entries fit into the model's vocabulary."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.distributed.pool import RankPools


def tokenizer_error(rank: int, world_size: int, kind: str, model: str | None) -> str | None:
    from megatron_trinity.errors import UsageError
    from megatron_trinity.training.vocabulary import check_tokenizer_path

    try:
        check_tokenizer_path(Namespace(tokenizer_type=kind, tokenizer_model=model))
    except UsageError as error:
        return str(error)
    return None


def test_tokenizer_paths(ranks: RankPools, tmp_path: Path) -> None:
    def error(kind: str, model: str | None) -> str | None:
        return ranks.run(tokenizer_error, kind, model, world_size=1)[0]

    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "tokenizer_config.json").write_text("{}")
    assert error("NullTokenizer", None) is None
    assert error("HuggingFaceTokenizer", str(full)) is None
    none = error("HuggingFaceTokenizer", None)
    assert none == "no tokenizer: give --tokenizer-model DIR, or --tokenizer-type"
    for wrong in (str(empty), str(tmp_path / "absent"), "some-org/some-model"):
        message = error("HuggingFaceTokenizer", wrong)
        assert message is not None
        assert message.startswith(f"--tokenizer-model {wrong} holds no tokenizer")
        assert "\n" not in message


def settle(
    rank: int, world_size: int, entries: int, given: int | None, divisor: int, tensor: int
) -> tuple[int, int] | str:
    from megatron_trinity.errors import UsageError
    from megatron_trinity.training import vocabulary

    args = Namespace(
        vocab_size=given,
        make_vocab_size_divisible_by=divisor,
        tensor_model_parallel_size=tensor,
    )
    tokenizer = SimpleNamespace(vocab_size=entries)
    with mock.patch.object(vocabulary, "get_tokenizer", return_value=tokenizer):
        try:
            vocabulary.settle_vocabulary(args)
        except UsageError as error:
            return str(error)
    return args.vocab_size, args.padded_vocab_size


@pytest.mark.parametrize(
    ("entries", "given", "divisor", "tensor", "expected"),
    [
        (160, None, 128, 1, (160, 256)),
        (160, 200, 128, 1, (200, 256)),
        (256, 256, 128, 1, (256, 256)),
        (257, 257, 128, 1, (257, 384)),
        (160, 160, 128, 4, (160, 512)),
        (160, 160, 1, 1, (160, 160)),
        (200000, 200192, 128, 8, (200192, 200704)),
    ],
)
def test_sizes(
    ranks: RankPools,
    entries: int,
    given: int | None,
    divisor: int,
    tensor: int,
    expected: tuple[int, int],
) -> None:
    [got] = ranks.run(settle, entries, given, divisor, tensor, world_size=1)
    assert got == expected
    true, padded = expected
    step = divisor * tensor
    assert padded == -(-true // step) * step


def test_a_tokenizer_larger_than_the_model_is_refused(ranks: RankPools) -> None:
    [got] = ranks.run(settle, 161, 160, 128, 1, world_size=1)
    expected: Any = (
        "the tokenizer has 161 entries, the model 160; use --vocab-size 161 or another tokenizer"
    )
    assert got == expected
