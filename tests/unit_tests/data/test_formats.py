"""Every format holds the same documents; a name or a content that is not known is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from backports import zstd

from megatron_trinity.data import chunks
from megatron_trinity.data.chunks import chunks_of
from megatron_trinity.data.documents import Skip, SkipReport
from megatron_trinity.data.formats import Format, Kind, format_of
from megatron_trinity.data.listing import expand_lists, source_files, survey
from megatron_trinity.data.records import documents_of, iterate_documents
from megatron_trinity.errors import TrinityError, UsageError

TEXTS = [f"text {i}: dernière 漢字\n" * (1 + i % 5) for i in range(150)]
LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS).encode()
TABLE = pa.table({"id": range(len(TEXTS)), "text": TEXTS})


def stream_of_arrow(path: Path, rows: int = 40) -> None:
    with pa.ipc.new_stream(path, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=rows)


def save_to_disk(path: Path) -> None:
    """The layout that `datasets` writes: streams, and what is known of them."""
    path.mkdir(parents=True)
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for part, name in zip((TABLE.slice(0, 70), TABLE.slice(70)), names, strict=True):
        with pa.ipc.new_stream(path / name, TABLE.schema) as writer:
            writer.write_table(part, max_chunksize=30)
    (path / "cache-1234.arrow").write_bytes(b"not data")
    (path / "dataset_info.json").write_text('{"features": {"text": "string"}}')
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (path / "state.json").write_text(json.dumps(state, indent=2))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "d.jsonl": lambda path: path.write_bytes(LINES),
    "d.JSONL": lambda path: path.write_bytes(LINES.removesuffix(b"\n")),
    "d.json": lambda path: path.write_bytes(LINES),
    "d.ndjson": lambda path: path.write_bytes(LINES),
    "d.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "d.json.GZ": lambda path: path.write_bytes(gzip.compress(LINES)),
    "d.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES)),
    "d.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES)),
    "d.ndjson.zst": lambda path: path.write_bytes(
        zstd.compress(LINES[:5000]) + zstd.compress(LINES[5000:])  # as pzstd writes it
    ),
    "d.parquet": lambda path: pa.parquet.write_table(TABLE, path, row_group_size=37),
    "d.arrow": stream_of_arrow,
    "d.feather": lambda path: pa.feather.write_feather(TABLE, path, chunksize=20),
    "saved": save_to_disk,
}


def listed(*sources: Path | str, given: Kind | None = None) -> Any:
    return source_files([str(source) for source in sources], "**/*", SkipReport(), given)


@pytest.mark.parametrize("name", WRITERS)
def test_each_format_gives_the_documents_in_order(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    report = SkipReport()
    assert survey(listed(path)).bytes > 0
    found = list(iterate_documents(listed(path), "text", report))
    assert [document.text for document in found] == TEXTS
    assert report.total == 0
    if name != "saved":
        assert [document.name for document in found[::149]] == [f"{path}:1", f"{path}:150"]
    assert {document.text_bytes for document in found} == {len(t.encode()) for t in TEXTS}


@pytest.mark.parametrize("name", WRITERS)
def test_reading_goes_on_from_any_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the place behind each chunk on, what is read is what was left."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(chunks, "_BLOCK", 700)
    WRITERS[name](tmp_path / "in" if name == "saved" else tmp_path / name)
    (tmp_path / "z.txt").write_text("the last one")
    source = tmp_path

    def texts(found: Any) -> list[str]:
        return [d.text for chunk in found for d in documents_of(chunk, "text", SkipReport())]

    cut = list(chunks_of(listed(source), "text"))
    assert len(cut) > 5
    assert texts(cut) == [*TEXTS, "the last one"]
    for number, chunk in enumerate(cut[:-1], 1):
        rest = chunks_of(listed(source), "text", chunk.after)
        assert texts(rest) == texts(cut[number:])


def test_files_of_a_saved_dataset_that_are_no_data_are_named(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved")
    report = SkipReport()
    files = source_files([str(tmp_path)], "**/*", report)
    assert [file.name for file in files] == [
        "saved/data-00000-of-00002.arrow", "saved/data-00001-of-00002.arrow"
    ]  # fmt: skip
    assert report.names == {
        Skip.METADATA: [
            f"{tmp_path}/saved/{name}"
            for name in ("cache-1234.arrow", "dataset_info.json", "state.json")
        ]
    }


def test_dictionary_of_splits_is_refused_with_their_names(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "all" / "train")
    (tmp_path / "all" / "test").mkdir()
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        UsageError, match=r"all is a `datasets` dictionary of the splits test, train"
    ):
        list(listed(tmp_path / "all"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/README", Format(Kind.TEXT)),
        ("a.b/.gitignore", Format(Kind.TEXT)),
        ("a.PY", Format(Kind.TEXT)),
        ("a.txt.gz", Format(Kind.TEXT, "gz")),
        ("a.Json.Zst", Format(Kind.JSON_LINES, "zst")),
        ("a.pq", Format(Kind.PARQUET)),
        ("a.parquet.gz", None),
        ("a.tar.gz", None),
        ("a.csv", None),
        ("a.foo", None),
    ],
)
def test_format_by_name(name: str, expected: Format | None) -> None:
    assert format_of(name) == expected


def test_unknown_names_are_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("a.txt", "b.csv", "c.csv", "d.tar.gz", "e.foo"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UsageError) as caught:
        survey(listed(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}/b.csv: .csv is not read: convert it to JSON lines or Parquet; "
        f"{tmp_path}/d.tar.gz: .tar.gz is not read: unpack it; "
        f"{tmp_path}/e.foo: .foo says no format that is known. "
        "Leave such files out with --glob, or say what all files are with --format"
    )
    given = list(
        iterate_documents(listed(tmp_path / "e.foo", given=Kind.TEXT), "text", SkipReport())
    )
    assert [document.text for document in given] == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "x"},\n{"text": "y"}]', r"one JSON array.*jq -c '\.\[\]'"),
        ("a.jsonl", b'[\n {"text": "x"}]', "one JSON array"),
        ("a.json", b'{\n "text": "x"\n}\n', "its first line is no object.*jq -c"),
        ("a.jsonl", gzip.compress(LINES), r"gzip data: give it the suffix \.gz"),
        ("a.jsonl", "{}".encode("utf-16"), "UTF-16: convert it, with iconv"),
        ("a.jsonl", b"PAR1....", r"Parquet: give it the suffix \.parquet"),
    ],
)
def test_other_content_than_the_name_says_is_refused(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrinityError, match=message):
        list(iterate_documents(listed(tmp_path), "text", SkipReport()))


def test_text_files_of_another_content_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ünicode", encoding="utf-16")
    (tmp_path / "b.txt").write_bytes(zstd.compress(b"x"))
    report = SkipReport()
    assert list(iterate_documents(listed(tmp_path), "text", report)) == []
    assert report.names == {
        Skip.UTF16: [f"{tmp_path}/a.txt"],
        Skip.OTHER_FORMAT: [f"{tmp_path}/b.txt (zstd data: give it the suffix .zst)"],
    }


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_without_text_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"d.{kind}"
    WRITERS[path.name](path)
    with pytest.raises(TrinityError, match=r"no column 'body', but id, text: .*--json-key"):
        list(iterate_documents(listed(path), "body", SkipReport()))
    with pytest.raises(TrinityError, match=r"column 'id' of .* is of int64, not of text"):
        list(iterate_documents(listed(path), "id", SkipReport()))


def test_rows_without_a_value_are_named_and_dictionaries_read(tmp_path: Path) -> None:
    column = pa.array(["a", None, " ", "a"]).dictionary_encode()
    pa.parquet.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    report = SkipReport()
    found = list(iterate_documents(listed(tmp_path), "text", report))
    assert [document.text for document in found] == ["a", "a"]
    assert report.names == {
        Skip.NO_VALUE: [f"{tmp_path}/d.parquet:2"],
        Skip.EMPTY: [f"{tmp_path}/d.parquet:3"],
    }


@pytest.mark.parametrize(
    "name", ["d.parquet", "d.arrow", "d.feather", "d.ndjson.zst", "d.jsonl.xz"]
)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    path.write_bytes(path.read_bytes()[:-40])
    report = SkipReport()
    found = list(iterate_documents(listed(path), "text", report))
    assert TEXTS[: len(found)] == [document.text for document in found]
    assert len(found) < len(TEXTS)
    (named,) = report.names[Skip.UNREADABLE]
    unit = "line" if "n" in name else "row"
    assert named.startswith(f"{path} after {unit} {len(found)} (")


def test_line_that_is_too_long_is_dropped_without_being_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, name in ((100, "_BLOCK"), (500, "CHUNK_BYTES"), (1000, "MAX_DOCUMENT_BYTES")):
        monkeypatch.setattr(chunks, name, value)
    long = json.dumps({"text": "x" * 5000})
    lines = ['{"text": "a"}', long, '{"text": "b"}', long]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    report = SkipReport()
    cut = list(chunks_of(listed(tmp_path), "text"))
    assert max(len(chunk.lines) for chunk in cut) < 1200
    found = list(iterate_documents(listed(tmp_path), "text", report))
    path = tmp_path / "d.jsonl"
    assert [(d.name, d.text) for d in found] == [(f"{path}:1", "a"), (f"{path}:3", "b")]
    assert report.names == {Skip.TOO_LARGE: [f"{path}:2", f"{path}:4"]}


def test_names_of_what_is_left_out_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n' + "\n" * 1000)
    report = SkipReport()
    assert len(list(iterate_documents(listed(tmp_path), "text", report))) == 1
    assert report.counts == {Skip.EMPTY: 1000}
    assert report.names[Skip.EMPTY] == [f"{tmp_path}/d.jsonl:{i}" for i in range(2, 102)]
    assert report.summary(1) == [
        f"1,000 empty or only white space: {tmp_path}/d.jsonl:2, and 999 more"
    ]
    twice = SkipReport.from_dict(report.as_dict())
    twice.extend(report)
    assert (twice.counts, twice.names) == ({Skip.EMPTY: 2000}, report.names)


def test_list_of_sources(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "list").write_text(f"{tmp_path}/b.txt\n\n  {tmp_path}/a.txt\n")
    sources = expand_lists([f"@{tmp_path}/list", "other"])
    assert sources == [f"{tmp_path}/b.txt", f"{tmp_path}/a.txt", "other"]
    assert [file.name for file in listed(*sources[:2])] == ["b.txt", "a.txt"]
    with pytest.raises(UsageError, match="list nowhere cannot be read: No such file"):
        expand_lists(["@nowhere"])
    (tmp_path / "list").write_text("\n")
    with pytest.raises(UsageError, match="names no source"):
        expand_lists([f"@{tmp_path}/list"])


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Input:
        buffer = io.BytesIO(LINES)

    monkeypatch.setattr(sys, "stdin", Input)
    found = list(iterate_documents(listed("-"), "text", SkipReport()))
    assert [document.text for document in found] == TEXTS
    assert found[1].name == "standard input:2"
    Input.buffer = io.BytesIO(b"one text")
    (document,) = iterate_documents(listed("-", given=Kind.TEXT), "text", SkipReport())
    assert document.text == "one text"


def test_remote_directory_and_file(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/data/b/d.jsonl.gz": gzip.compress(LINES), "/data/a.txt": b"first"})
    parquet = io.BytesIO()
    pa.parquet.write_table(TABLE, parquet)
    memory.pipe({"/data/c.parquet": parquet.getvalue()})
    try:
        found = list(iterate_documents(listed("memory://data"), "text", SkipReport()))
        assert [document.text for document in found] == ["first", *TEXTS, *TEXTS]
        assert found[0].split_key == "a.txt"
        (alone,) = iterate_documents(listed("memory://data/a.txt"), "text", SkipReport())
        assert (alone.text, alone.split_key) == ("first", "a.txt")
        before = survey(listed("memory://data")).fingerprint
        memory.pipe({"/data/a.txt": b"other"})
        assert survey(listed("memory://data")).fingerprint != before
    finally:
        memory.rm("/data", recursive=True)
    with pytest.raises(UsageError, match="source memory://data is not there"):
        list(listed("memory://data"))
    with pytest.raises(UsageError, match="source nothing://x is no URL that is known"):
        list(listed("nothing://x"))


def test_hub_without_a_network_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TrinityError, match="source hf://datasets/some/corpus") as caught:
        list(listed("hf://datasets/some/corpus"))
    assert "\n" not in str(caught.value)
