from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets import indexed_dataset as upstream

from megatron_trinity.data import indexed
from megatron_trinity.data.indexed import HEADER, check_indexed_dataset, unigram_entropy
from megatron_trinity.errors import TrinityError

DOCUMENTS = [[5, 6, 7], [8], list(range(100)), [1, 2]]


def build(prefix: Path, dtype: type[np.integer] = np.uint16) -> Path:
    builder = upstream.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def index_bytes(code: int, lengths: list[int], pointers: list[int], marks: list[int]) -> bytes:
    """An index written from the format's description, not by upstream."""
    return (
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(marks))
        + np.array(lengths, "<i4").tobytes()
        + np.array(pointers, "<i8").tobytes()
        + np.array(marks, "<i8").tobytes()
    )


def test_format_is_upstreams() -> None:
    assert upstream._INDEX_HEADER == indexed.MAGIC
    codes = {
        code.value: np.dtype(getattr(np, code.name))
        for code in upstream.DType
        if not code.name.startswith("float")
    }
    assert codes == indexed.TOKEN_DTYPES


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_sound_dataset_of_upstreams_builder(tmp_path: Path, dtype: type[np.integer]) -> None:
    info = check_indexed_dataset(build(tmp_path / "d", dtype))
    assert (info.sequences, info.documents, info.tokens) == (4, 4, 106)
    assert info.dtype == np.dtype(dtype)


def test_documents_of_several_and_of_no_sequences(tmp_path: Path) -> None:
    (tmp_path / "d.idx").write_bytes(index_bytes(4, [2, 0, 1], [0, 8, 8], [0, 2, 2, 3]))
    (tmp_path / "d.bin").write_bytes(bytes(12))
    info = check_indexed_dataset(str(tmp_path / "d"))
    assert (info.sequences, info.documents, info.tokens) == (3, 3, 3)


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = Path(f"{build(tmp_path / 'd')}.{suffix}")
    path.unlink()
    expected = f"{path} cannot be read (No such file or directory): check the path"
    with pytest.raises(TrinityError, match=re.escape(expected)):
        check_indexed_dataset(tmp_path / "d")


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_every_truncation_is_noticed(tmp_path: Path, suffix: str) -> None:
    path = Path(f"{build(tmp_path / 'd')}.{suffix}")
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(TrinityError, match=rf"d\.{suffix} is truncated: {size} bytes, .* asks"):
            check_indexed_dataset(tmp_path / "d")


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_bytes_at_the_end_are_noticed(tmp_path: Path, suffix: str) -> None:
    path = Path(f"{build(tmp_path / 'd')}.{suffix}")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(TrinityError, match=rf"d\.{suffix} is too long"):
        check_indexed_dataset(tmp_path / "d")


@pytest.mark.parametrize("swapped", ["idx", "bin"])
def test_files_of_two_datasets_are_noticed(tmp_path: Path, swapped: str) -> None:
    """Swapped, or of data that was made again under the same prefix and only half of it copied."""
    build(tmp_path / "d")
    builder = upstream.IndexedDatasetBuilder(f"{tmp_path / 'other'}.bin", dtype=np.uint16)
    builder.add_document(np.arange(50), [50])
    builder.finalize(f"{tmp_path / 'other'}.idx")
    (tmp_path / f"other.{swapped}").replace(tmp_path / f"d.{swapped}")
    what = "too long: 212 bytes" if swapped == "idx" else "truncated: 100 bytes"
    with pytest.raises(TrinityError, match=rf"d\.bin is {what}, d\.idx asks for"):
        check_indexed_dataset(tmp_path / "d")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_every_flipped_bit_of_header_lengths_and_pointers_is_noticed(
    tmp_path: Path, dtype: type[np.integer]
) -> None:
    build(tmp_path / "d", dtype)
    path = tmp_path / "d.idx"
    whole = path.read_bytes()
    for bit in range(8 * (HEADER.size + 12 * len(DOCUMENTS))):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(TrinityError, match=r"d\.(idx|bin) is (corrupt|truncated|too long)"):
            check_indexed_dataset(tmp_path / "d")


LENGTHS, POINTERS, MARKS = [3, 1, 2], [0, 6, 8], [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (index_bytes(6, LENGTHS, POINTERS, MARKS), r"dtype code 6 is not one of \[1, 2, 3, 4, 5"),
        (index_bytes(8, LENGTHS, [0, 8, 6], MARKS), "pointer of sequence 1 is wrong"),
        (index_bytes(8, LENGTHS, [2, 8, 10], MARKS), "pointer of sequence 0 is wrong"),
        (index_bytes(8, [3, -1, 4], [0, 6, 4], MARKS), "sequence 1 has a length below 0"),
        (index_bytes(8, LENGTHS, POINTERS, [0, 2, 1, 3]), "document marks 0 to 3 go back"),
        (index_bytes(8, LENGTHS, POINTERS, [-1, 1, 2, 3]), "document marks 0 to 3 go back"),
        (index_bytes(8, LENGTHS, POINTERS, [1, 1, 2, 3]), "cover sequences 1 to 3, not 0 to 3"),
        (index_bytes(8, LENGTHS, POINTERS, [0, 1, 2, 4]), "cover sequences 0 to 4, not 0 to 3"),
        (index_bytes(8, LENGTHS, POINTERS, [0, 1, 2, 2]), "cover sequences 0 to 2, not 0 to 3"),
        (index_bytes(8, [], [], [0]), "holds 0 sequences and 0 documents"),
        (b"\x1f\x8b" + bytes(60), "does not start as an indexed dataset does"),
    ],
)
def test_corruption_is_told_in_one_line(tmp_path: Path, index: bytes, message: str) -> None:
    (tmp_path / "d.idx").write_bytes(index)
    (tmp_path / "d.bin").write_bytes(bytes(12))
    with pytest.raises(TrinityError, match=rf"d\.idx is corrupt: .*{message}") as caught:
        check_indexed_dataset(tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert "tools/prepare_data.py --overwrite" in str(caught.value)


@pytest.mark.parametrize("place", [0, 1, 6, 7, 8, 18])
def test_chunks_do_not_hide_what_is_at_their_borders(
    tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", 7)
    lengths, marks = [2] * 19, list(range(20))
    pointers = [8 * i for i in range(19)]
    (tmp_path / "d.bin").write_bytes(bytes(8 * 19))
    (tmp_path / "d.idx").write_bytes(index_bytes(4, lengths, pointers, marks))
    assert check_indexed_dataset(tmp_path / "d").tokens == 38

    wrong = [*pointers]
    wrong[place] += 4
    (tmp_path / "d.idx").write_bytes(index_bytes(4, lengths, wrong, marks))
    with pytest.raises(TrinityError, match=f"pointer of sequence {place} is wrong"):
        check_indexed_dataset(tmp_path / "d")

    wrong = [*marks]
    wrong[place] += 5
    (tmp_path / "d.idx").write_bytes(index_bytes(4, lengths, pointers, wrong))
    with pytest.raises(TrinityError, match=r"documents cover|document marks"):
        check_indexed_dataset(tmp_path / "d")


def test_pointers_beyond_2_31_bytes(tmp_path: Path) -> None:
    """Three documents of 1.2 GB each, in a sparse file: the last one starts beyond 2^31 bytes."""
    length = 600_000_000
    with open(tmp_path / "d.bin", "wb") as stream:
        stream.truncate(3 * length * 2)
        stream.seek(3 * length * 2 - 4)
        stream.write(np.array([41, 42], np.uint16).tobytes())
    index = index_bytes(8, [length] * 3, [0, 2 * length, 4 * length], [0, 1, 2, 3])
    (tmp_path / "d.idx").write_bytes(index)

    assert check_indexed_dataset(tmp_path / "d").tokens == 3 * length
    dataset = upstream.IndexedDataset(str(tmp_path / "d"))
    assert dataset.get(2, offset=length - 2).tolist() == [41, 42]

    with open(tmp_path / "d.bin", "r+b") as stream:
        stream.truncate(3 * length * 2 - 2**31)
    with pytest.raises(TrinityError, match=r"d\.bin is truncated"):
        check_indexed_dataset(tmp_path / "d")


def entropy_of(counts: list[int]) -> float:
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts if n)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=30).filter(any))
def test_unigram_entropy_against_its_definition(counts: list[int]) -> None:
    found = unigram_entropy(np.array(counts, np.int64))
    assert math.isclose(found, entropy_of(counts), rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("counts", "entropy"),
    [([7, 7, 7, 7], math.log(4)), ([9, 0], 0.0), ([3, 1], 0.5623351446188083), ([0, 0], 0.0)],
)
def test_unigram_entropy_values(counts: list[int], entropy: float) -> None:
    found = unigram_entropy(np.array(counts, np.int64))
    assert found == pytest.approx(entropy, abs=1e-12)
    assert math.copysign(1, found) == 1


def test_every_check_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The .bin is never opened."""
    build(tmp_path / "d")
    opened: list[str] = []
    original: Callable[..., object] = open

    def record(path: object, *args: object, **kwargs: object) -> object:
        opened.append(str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", record)
    check_indexed_dataset(tmp_path / "d")
    assert [path for path in opened if path.endswith(".bin")] == []
    assert [path for path in opened if path.endswith(".idx")] != []
