from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_trinity.data import opened
from megatron_trinity.data.documents import (
    PYTHON_STDLIB,
    Document,
    Skip,
    SkipReport,
    assign_split,
)
from megatron_trinity.data.listing import (
    SourceFile,
    _Tree,
    refuse_output_inside_sources,
    source_files,
    survey,
)
from megatron_trinity.data.records import iterate_documents
from megatron_trinity.errors import UsageError
from tests.paths import ROOT


def read(
    *sources: Path | str, glob: str = "**/*", key: str = "text"
) -> tuple[list[Document], SkipReport]:
    report = SkipReport()
    files = source_files([str(source) for source in sources], glob, report)
    return list(iterate_documents(files, key, report)), report


def list_files(root: Path) -> list[SourceFile]:
    return list(source_files([str(root)], "**/*", SkipReport()))


def make_files(root: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_directory_is_read_sorted_and_exactly(tmp_path: Path) -> None:
    make_files(tmp_path, b_txt="two\r\n", sub__a_md="three é", a_txt="\ufeffone")
    documents, report = read(tmp_path)
    assert [(d.split_key, d.text, d.text_bytes) for d in documents] == [
        ("a.txt", "\ufeffone", 6),
        ("b.txt", "two\r\n", 5),
        ("sub/a.md", "three é", 8),
    ]
    assert documents[2].name == f"{tmp_path}/sub/a.md"
    assert report.total == 0


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("**/*", ["a.txt", "x/b.md", "x/y/c.txt"]),
        ("*", ["a.txt"]),
        ("**/*.txt", ["a.txt", "x/y/c.txt"]),
        ("x/**", ["x/b.md", "x/y/c.txt"]),
        ("*/*", ["x/b.md"]),
        ("**/y/*.[st]xt", ["x/y/c.txt"]),
        ("?.txt", ["a.txt"]),
        ("none", []),
    ],
)
def test_glob(tmp_path: Path, glob: str, expected: list[str]) -> None:
    make_files(tmp_path, a_txt="a", x__b_md="b", x__y__c_txt="c")
    assert [d.split_key for d in read(tmp_path, glob=glob)[0]] == expected


def test_single_file_has_the_name_it_has_in_its_directory(tmp_path: Path) -> None:
    make_files(tmp_path, a_txt="a")
    (document,), _ = read(tmp_path / "a.txt")
    assert document.split_key == "a.txt"


def test_unusable_files_are_counted_and_named(tmp_path: Path) -> None:
    make_files(
        tmp_path,
        empty_txt="",
        space_txt=" \n\t",
        nul_txt="a\0b",
        latin_txt=b"caf\xe9",
        good_txt="x",
    )
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    documents, report = read(tmp_path)
    assert [d.split_key for d in documents] == ["good.txt"]
    at = f"{tmp_path}/"
    assert report.as_dict() == {
        "unreadable": {"count": 1, "names": [f"{at}dangling (No such file or directory)"]},
        "empty or only white space": {"count": 2, "names": [f"{at}empty.txt", f"{at}space.txt"]},
        "not text (not UTF-8, or holds a NUL)": {
            "count": 2,
            "names": [f"{at}latin.txt", f"{at}nul.txt"],
        },
        "not a regular file": {"count": 1, "names": [f"{at}pipe"]},
    }
    assert report.total == 6


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By hand: the super-user, who often runs tests, may read any file.
    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    make_files(tmp_path, a_txt="a")
    monkeypatch.setattr(opened, "open_raw", refuse)
    documents, report = read(tmp_path)
    assert documents == []
    assert report.names == {Skip.UNREADABLE: [f"{tmp_path}/a.txt (Permission denied)"]}


def test_unreadable_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, a_txt="a", closed__b_txt="b")
    scan = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    documents, report = read(tmp_path)
    assert [d.text for d in documents] == ["a"]
    assert report.names == {Skip.UNREADABLE: [f"{tmp_path}/closed (Permission denied)"]}


def test_links_are_neither_followed_for_ever_nor_counted_twice(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    make_files(root, m_txt="inside", sub__n_txt="deeper")
    make_files(outside, o_txt="outside")
    (root / "a_link_before_its_target").symlink_to("m.txt")
    (root / "z_to_outside").symlink_to(outside / "o.txt")
    (root / "sub" / "loop").symlink_to(root)
    documents, report = read(root)
    assert [d.split_key for d in documents] == ["m.txt", "sub/n.txt", "z_to_outside"]
    assert report.names == {
        Skip.DUPLICATE: [f"{root}/a_link_before_its_target"],
        Skip.LINKED_DIRECTORY: [f"{root}/sub/loop"],
    }


def test_file_of_two_sources_is_taken_once(tmp_path: Path) -> None:
    make_files(tmp_path, a_txt="a", sub__b_txt="b")
    documents, report = read(tmp_path / "sub", tmp_path)
    assert [d.split_key for d in documents] == ["b.txt", "a.txt"]
    assert report.names == {Skip.DUPLICATE: [f"{tmp_path}/sub/b.txt"]}


def test_name_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")).write_text("x")
    (document,), _ = read(tmp_path)
    assert document.split_key == "caf\\xe9"
    assert document.name.encode()


JSON_LINES = [
    (b'{"text": "one", "id": 1}', None),
    (b"", Skip.EMPTY),
    (b'{"text": "two"', Skip.BAD_JSON),
    (b'{"body": "three"}', Skip.NO_TEXT_KEY),
    (b'{"text": null}', Skip.NO_TEXT_KEY),
    (b'["text"]', Skip.NO_TEXT_KEY),
    (b'{"text": "  "}', Skip.EMPTY),
    (b'{"text": "\xff"}', Skip.NOT_TEXT),
    (b'{"text": "a\\u0000b"}', Skip.NOT_TEXT),
    (b'{"text": "\\ud800"}', Skip.NOT_TEXT),
    (b"[" * 100_000, Skip.BAD_JSON),
    (b'{"text": ' + b"1" * 5_000 + b"}", Skip.BAD_JSON),
    ('{"text": "dernière"}'.encode(), None),
]


@pytest.mark.parametrize("compressed", [False, True])
def test_json_lines(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / ("d.jsonl.gz" if compressed else "d.jsonl")
    content = b"\n".join(line for line, _ in JSON_LINES)
    path.write_bytes(gzip.compress(content) if compressed else content)
    documents, report = read(path)
    assert [(d.name, d.text) for d in documents] == [
        (f"{path}:1", "one"),
        (f"{path}:13", "dernière"),
    ]
    expected: dict[Skip, list[str]] = {}
    for number, (_, reason) in enumerate(JSON_LINES, 1):
        if reason is not None:
            expected.setdefault(reason, []).append(f"{path}:{number}")
    assert report.names == expected


def test_json_lines_inside_a_directory_and_another_key(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('\ufeff{"body": "one"}\n{"body": "two"}\n', encoding="utf-8")
    assert [d.text for d in read(tmp_path, key="body")[0]] == ["one", "two"]


def test_json_line_is_split_by_its_text_not_by_its_place(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {i}"}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join([json.dumps({"text": "new"}), *reversed(lines)]))
    a = {d.text: d.split_key for d in read(tmp_path / "a.jsonl")[0]}
    b = {d.text: d.split_key for d in read(tmp_path / "b.jsonl")[0]}
    assert a == {text: key for text, key in b.items() if text != "new"}
    assert len(set(a.values())) == 20


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_gzip_is_named(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "d.jsonl.gz"
    text = "\n".join(json.dumps({"text": os.urandom(50).hex()}) for _ in range(500))
    whole = gzip.compress(text.encode())
    path.write_bytes(whole[: int(len(whole) * kept)])
    documents, report = read(path)
    (name,) = report.names[Skip.UNREADABLE]
    assert name.startswith(f"{path} after line {len(documents)} (")
    assert len(documents) < 500


def test_not_gzip_at_all_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(b'{"text": "plain"}')
    documents, report = read(path)
    assert documents == []
    assert len(report.names[Skip.UNREADABLE]) == 1


def test_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"source .*/nowhere is not there"):
        read(tmp_path / "nowhere")


def test_python_stdlib() -> None:
    report = SkipReport()
    files = source_files([PYTHON_STDLIB], "ignored", report)
    names = [file.name for file in files]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    excluded = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    assert not [name for name in names if excluded & set(name.split("/"))]
    assert names == sorted(names)


def test_summary_names_some_and_counts_all() -> None:
    report = SkipReport({Skip.EMPTY: ["a", "b", "c"], Skip.NOT_TEXT: ["d"]})
    assert report.summary(shown=1) == [
        "3 empty or only white space: a, and 2 more",
        "1 not text (not UTF-8, or holds a NUL): d",
    ]


def test_split_values_never_change() -> None:
    """Fixed values: another assignment would move documents between the splits of old datasets."""
    valid = [i for i in range(200) if assign_split(f"{i}.txt", 0.05) == "valid"]
    assert valid == [17, 18, 26, 33, 64, 94, 96, 102, 139, 191, 194]


@given(st.text(max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_larger_fraction_only_adds_to_validation(key: str, a: float, b: float) -> None:
    low, high = sorted((a, b))
    if assign_split(key, low) == "valid":
        assert assign_split(key, high) == "valid"
    assert assign_split(key, 0.0) == "train"
    assert assign_split(key, 1.0) == "valid"


def test_split_fraction_is_met() -> None:
    share = sum(assign_split(str(i), 0.05) == "valid" for i in range(20_000)) / 20_000
    assert abs(share - 0.05) < 4 * (0.05 * 0.95 / 20_000) ** 0.5


def test_split_does_not_depend_on_the_process() -> None:
    code = (
        "from megatron_trinity.data.documents import assign_split as a;"
        "print([a(str(i), 0.3) for i in range(50)])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{[assign_split(str(i), 0.3) for i in range(50)]}\n"}


def test_fingerprint_notices_each_change(tmp_path: Path) -> None:
    make_files(tmp_path, a_txt="a", b_txt="b")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    before = survey(list_files(tmp_path)).fingerprint
    assert survey(list_files(tmp_path)).fingerprint == before
    os.utime(tmp_path / "a.txt", ns=(1, 2))
    touched = survey(list_files(tmp_path)).fingerprint
    make_files(tmp_path, c_txt="c")
    assert len({before, touched, survey(list_files(tmp_path)).fingerprint}) == 3


def test_output_inside_a_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError, match="inside source"):
        refuse_output_inside_sources(tmp_path / "in" / "deep" / "out", [str(tmp_path / "in")])
    refuse_output_inside_sources(tmp_path / "out", [PYTHON_STDLIB, str(tmp_path / "in")])


def test_file_that_an_earlier_source_leaves_out_is_no_duplicate() -> None:
    """The tests of the standard library are none of `python-stdlib`."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    report = SkipReport()
    own = source_files([PYTHON_STDLIB, str(stdlib / "json")], "**/*.py", report)
    assert len([file for file in own if file.path.startswith(f"{stdlib}/json/")]) > 3
    assert report.counts == {Skip.DUPLICATE: len(list((stdlib / "json").glob("*.py")))}
    left_out = stdlib / "json" / "tests"
    assert not _Tree(str(stdlib), None).has(str(left_out / "a.py"))
    assert _Tree(str(stdlib), ["**", "*.py"]).has(str(left_out / "a.py"))
