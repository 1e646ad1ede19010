from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType
from transformers import AutoTokenizer

from megatron_trinity.data import encode, token_model
from megatron_trinity.data.chunks import Chunk, Place
from megatron_trinity.data.documents import Skip
from megatron_trinity.data.encode import Encoding, Result, available_cpus, encode_in_order
from megatron_trinity.data.interrupts import interrupts_deferred
from megatron_trinity.data.token_model import Encoder, TokenizerInfo, load_tokenizer, token_dtype
from megatron_trinity.errors import TrinityError, UsageError


@pytest.fixture(scope="module")
def info(tokenizer_dir: Path) -> TokenizerInfo:
    return load_tokenizer(tokenizer_dir)


def chunk(*texts: str) -> Chunk:
    return Chunk(Place(1), "texts", rows=list(texts))


def encoding(info: TokenizerInfo, append_eod: bool = True) -> Encoding:
    return Encoding(info, "text", 0.0, append_eod)


def ids_of(info: TokenizerInfo, eod: int | None, dtype: type[np.integer], text: str) -> np.ndarray:
    (ids,) = Encoder(info.serialized, eod, np.dtype(dtype)).encode([text])
    assert ids is not None
    return ids


def test_what_is_loaded(info: TokenizerInfo) -> None:
    assert (info.vocab_size, info.eod_token, info.eod_id) == (300, "<|end_of_text|>", 1)
    assert len(info.sha256) == 64


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 65536, 200192])
def test_dtype_is_megatrons(vocab_size: int) -> None:
    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


def test_ids_are_those_of_the_hugging_face_tokenizer(
    info: TokenizerInfo, tokenizer_dir: Path
) -> None:
    text = "the router, 1234567 ¿漢字?\n"
    expected = AutoTokenizer.from_pretrained(str(tokenizer_dir))(text).input_ids
    ids = ids_of(info, None, np.uint16, text)
    assert ids.tolist() == expected
    ids = ids_of(info, 1, np.int32, text)
    assert ids.tolist() == [*expected, 1]
    assert ids.dtype == np.int32


def test_names_of_special_tokens_in_a_document_are_text(info: TokenizerInfo) -> None:
    ids = ids_of(info, 1, np.uint16, "a<|end_of_text|>b<|pad|>")
    assert [i for i in ids.tolist() if i < 5] == [1]
    assert ids[-1] == 1


def test_text_without_tokens_has_no_end_either(info: TokenizerInfo) -> None:
    ids = ids_of(info, 1, np.uint16, "")
    assert ids.size == 0


def test_truncation_and_padding_of_a_tokenizer_are_not_applied(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 4, "pad_type_id": 0, "pad_token": "<|pad|>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ids = ids_of(load_tokenizer(tmp_path), None, np.uint16, "xyz")
    assert ids.size == 3


def test_missing_or_damaged_tokenizer_is_told_in_one_line(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer.json in .*train_tokenizer.py"):
        load_tokenizer(tmp_path)
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(TrinityError, match="does not load") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TrinityError, match="300 tokens but ids beyond"):
        load_tokenizer(tmp_path)


def test_order_is_kept_when_chunks_finish_in_another(info: TokenizerInfo) -> None:
    """Chunks of very different sizes on three workers, with more of them than are kept waiting."""
    chunks = [chunk(f"{i} " + "router " * (60_000 if i % 5 == 0 else 1), "b") for i in range(30)]
    alone = list(encode_in_order(chunks, encoding(info), 1))
    together = list(encode_in_order(chunks, encoding(info), 3))
    assert len(alone) == len(together) == 30
    for a, b in zip(alone, together, strict=True):
        one, other = a.splits["train"], b.splits["train"]
        assert one.ids.dtype == other.ids.dtype == np.uint16
        np.testing.assert_array_equal(one.ids, other.ids)
        assert one.lengths.tolist() == other.lengths.tolist()
        assert one.text_bytes == other.text_bytes > 1
    first = together[3].splits["train"]
    assert first.ids.tolist() == [*ids_of(info, 1, np.uint16, "3 router "), first.ids[-2], 1]


def read_for_one_result(info: TokenizerInfo, characters: int) -> int:
    """Chunks that two workers take from an endless source before the first result is there."""
    read = 0

    def endless():  # type: ignore[no-untyped-def]
        nonlocal read
        while True:
            read += 1
            yield chunk("x" * characters)

    encoded = encode_in_order(endless(), encoding(info, False), 2)
    next(encoded)
    encoded.close()
    return read


def test_reading_stays_a_bounded_distance_ahead(info: TokenizerInfo) -> None:
    assert read_for_one_result(info, 1000) <= 2 * 4 + 1


def test_bytes_ahead_are_bounded_too(info: TokenizerInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """One long document at a time, however many workers there are."""
    monkeypatch.setattr(encode, "_BYTES_AHEAD", 1000)
    assert read_for_one_result(info, 2000) == 2


def test_killed_worker_is_told(info: TokenizerInfo) -> None:
    import multiprocessing

    def found():  # type: ignore[no-untyped-def]
        yield chunk("a" * (1 << 18))
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)
        yield chunk("b" * (1 << 18))

    with pytest.raises(TrinityError, match=r"was killed.*fewer --workers"):
        list(encode_in_order(found(), encoding(info), 2))


def test_no_eos_is_known(info: TokenizerInfo) -> None:
    alone = replace(info, eod_id=None)
    (result,) = encode_in_order([chunk("ab")], encoding(alone, False), 1)
    assert isinstance(result, Result)
    assert result.splits["train"].ids.size == 2


def test_long_text_has_the_tokens_of_the_whole(
    info: TokenizerInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into some thirty pieces; the reference is the same text encoded at once."""
    lines = [f"line {i}, 1234567\n" + "\n  \t" * (i % 3) + "漢字 " * (i % 2) for i in range(300)]
    text = "".join(lines)
    whole = ids_of(info, 1, np.uint16, text)
    monkeypatch.setattr(token_model, "PIECE", len(text) // 30)
    monkeypatch.setattr(token_model, "_LONGEST_PIECE", len(text) // 15)
    pieces: list[str] = []
    original = Encoder._ids

    def counted(self: Encoder, parts: Sequence[str]) -> list[list[int]]:
        pieces.extend(parts)
        return original(self, parts)

    monkeypatch.setattr(Encoder, "_ids", counted)
    np.testing.assert_array_equal(ids_of(info, 1, np.uint16, text), whole)
    assert len(pieces) > 4 * 15


def test_long_text_without_a_place_to_cut_is_left_out(
    info: TokenizerInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_model, "PIECE", 100)
    monkeypatch.setattr(token_model, "_LONGEST_PIECE", 200)
    (result,) = encode_in_order([chunk("x" * 1000, "b")], encoding(info), 1)
    assert result.report.names == {Skip.TOO_LARGE: ["texts:1"]}
    assert result.splits["train"].lengths.tolist() == [2]


def test_cpus() -> None:
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)


def test_interrupt_that_an_import_swallows_is_not_lost() -> None:
    after = []

    def import_something() -> None:
        with interrupts_deferred(), contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
            after.append("went on")

    with pytest.raises(KeyboardInterrupt):
        import_something()
    assert after == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
