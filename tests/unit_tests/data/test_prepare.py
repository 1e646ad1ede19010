from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from megatron_trinity.data import encode, prepare
from megatron_trinity.data.documents import assign_split
from megatron_trinity.data.prepare import PrepareRequest, prepare_dataset
from megatron_trinity.errors import TrinityError, UsageError
from tests.paths import ROOT

EOD = 1


@pytest.fixture
def job(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> PrepareRequest:
    return PrepareRequest((str(corpus),), tokenizer_dir, tmp_path / "out" / "d", valid_fraction=0.3)


def contents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_datasets_hold_the_documents_in_order(
    job: PrepareRequest, corpus: Path, tokenizer_dir: Path
) -> None:
    """Reference: a plain loop over sorted names with the Hugging Face tokenizer."""
    made, is_new = prepare_dataset(job)
    assert is_new
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    expected: dict[str, list[list[int]]] = {"train": [], "valid": []}
    size = {"train": 0, "valid": 0}
    for name in sorted(path.relative_to(corpus).as_posix() for path in corpus.rglob("*.txt")):
        text = (corpus / name).read_text()
        split = assign_split(name, 0.3)
        expected[split].append([*tokenizer(text).input_ids, EOD])
        size[split] += len(text.encode())
    assert expected["train"]
    assert expected["valid"]
    for split, found in made["splits"].items():
        prefix = Path(f"{job.output}_{split}")
        assert contents(prefix) == expected[split]
        assert IndexedDataset(str(prefix)).document_indices.tolist() == list(
            range(len(expected[split]) + 1)
        )
        ids = np.concatenate([np.array(document) for document in expected[split]])
        share = np.unique(ids, return_counts=True)[1] / len(ids)
        assert found == {
            "documents": len(expected[split]),
            "tokens": len(ids),
            "bytes": size[split],
            "dtype": "uint16",
            "max_token_id": ids.max(),
            "unigram_entropy_nats": pytest.approx(-(share * np.log(share)).sum(), rel=1e-12),
            "sha256": hashlib.sha256(ids.astype(np.uint16).tobytes()).hexdigest(),
        }
    assert sorted(files_of(job.output.parent)) == [
        "d.json", "d_train.bin", "d_train.idx", "d_valid.bin", "d_valid.idx"
    ]  # fmt: skip
    assert json.loads((job.output.parent / "d.json").read_text()) == made


def test_result_does_not_depend_on_the_number_of_workers(job: PrepareRequest) -> None:
    other = job.output.parents[1] / "other"
    prepare_dataset(job)
    prepare_dataset(replace(job, workers=3, output=other / "d"))
    assert files_of(job.output.parent) == files_of(other)


def test_without_eod(job: PrepareRequest) -> None:
    with_end, _ = prepare_dataset(job)
    bare, _ = prepare_dataset(replace(job, append_eod=False, overwrite=True))
    for split in ("train", "valid"):
        documents = with_end["splits"][split]["documents"]
        assert with_end["splits"][split]["tokens"] - bare["splits"][split]["tokens"] == documents
        assert not [ids for ids in contents(Path(f"{job.output}_{split}")) if EOD in ids]


def test_second_run_does_nothing(job: PrepareRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = prepare_dataset(job)
    monkeypatch.setattr(prepare, "encode_in_order", None)  # calling it would fail
    assert prepare_dataset(job) == (made, False)
    assert prepare_dataset(replace(job, workers=7)) == (made, False)


def test_any_other_jobis_refused_and_overwrites_when_asked(
    job: PrepareRequest, corpus: Path
) -> None:
    prepare_dataset(job)
    before = files_of(job.output.parent)
    for other in (
        replace(job, valid_fraction=0.4),
        replace(job, append_eod=False),
        replace(job, glob="**/*.txt"),
        replace(job, json_key="body"),
        replace(job, sources=(f"{corpus}/part0", f"{corpus}/part1")),
    ):
        with pytest.raises(TrinityError, match=r"d_train.bin \(and 4 more\) is there already"):
            prepare_dataset(other)
        assert files_of(job.output.parent) == before
    (corpus / "new.txt").write_text("new")
    with pytest.raises(TrinityError, match="is there already"):
        prepare_dataset(job)
    made, is_new = prepare_dataset(replace(job, overwrite=True))
    assert is_new
    assert sum(split["documents"] for split in made["splits"].values()) == 41


def test_another_tokenizer_is_another_request(
    job: PrepareRequest, tokenizer_dir: Path, tmp_path: Path
) -> None:
    prepare_dataset(job)
    copy = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, copy)
    assert not prepare_dataset(replace(job, tokenizer=copy))[1]
    with open(copy / "tokenizer.json", "a") as stream:
        stream.write("\n")
    with pytest.raises(TrinityError, match="is there already"):
        prepare_dataset(replace(job, tokenizer=copy))


def test_damaged_result_is_told_by_the_second_run(job: PrepareRequest) -> None:
    prepare_dataset(job)
    path = Path(f"{job.output}_valid.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(TrinityError, match=r"d_valid.bin is truncated.*--overwrite"):
        prepare_dataset(job)
    assert prepare_dataset(replace(job, overwrite=True))[1]
    assert not prepare_dataset(job)[1]


def test_swapped_result_is_told_by_the_second_run(job: PrepareRequest) -> None:
    prepare_dataset(job)
    for suffix in ("bin", "idx"):
        shutil.copy(f"{job.output}_train.{suffix}", f"{job.output}_valid.{suffix}")
    with pytest.raises(TrinityError, match=r"d_valid holds .* not what .*d.json says"):
        prepare_dataset(job)


def test_no_validation_split_removes_the_one_of_before(job: PrepareRequest) -> None:
    prepare_dataset(job)
    made, _ = prepare_dataset(replace(job, valid_fraction=0.0, overwrite=True))
    assert list(made["splits"]) == ["train"]
    assert sorted(files_of(job.output.parent)) == ["d.json", "d_train.bin", "d_train.idx"]
    assert len(contents(Path(f"{job.output}_train"))) == 40


def test_documents_left_out_are_in_the_manifest(job: PrepareRequest, corpus: Path) -> None:
    (corpus / "blank.txt").write_text("\n")
    (corpus / "binary.txt").write_bytes(b"\0\1")
    made, _ = prepare_dataset(job)
    assert made["skipped"] == {
        "empty or only white space": {"count": 1, "names": [f"{corpus}/blank.txt"]},
        "not text (not UTF-8, or holds a NUL)": {"count": 1, "names": [f"{corpus}/binary.txt"]},
    }


def test_documents_without_tokens_or_too_long_are_left_out(
    job: PrepareRequest, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Long:
        def __len__(self) -> int:
            return 2**31

    first, second = (corpus / name for name in ("part0/00.txt", "part1/01.txt"))
    strange: dict[str, Any] = {
        first.read_text(): np.array([], np.uint16),
        second.read_text(): Long(),
    }
    nine = np.array([9], np.uint16)
    monkeypatch.setattr(
        encode.Encoder, "encode", lambda _, texts: [strange.get(t, nine) for t in texts]
    )
    made, _ = prepare_dataset(job)
    assert made["skipped"] == {
        "no tokens": {"count": 1, "names": [str(first)]},
        "more than 2^31 - 1 tokens": {"count": 1, "names": [str(second)]},
    }
    assert sum(split["documents"] for split in made["splits"].values()) == 38


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_interruption_leaves_what_was_there(
    job: PrepareRequest,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    overwrite: bool,
) -> None:
    if overwrite:
        prepare_dataset(job)
    before = files_of(job.output.parent) if overwrite else {}
    added = 0
    original = prepare.SplitWriter.add

    def add(*arguments: Any) -> None:
        nonlocal added
        added += 1
        if added == 1:
            raise error
        original(*arguments)

    monkeypatch.setattr(prepare.SplitWriter, "add", add)
    expected = TrinityError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        prepare_dataset(replace(job, overwrite=overwrite, workers=2))
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {job.output}: No space left on device"
    assert files_of(job.output.parent) == before


def test_interruption_while_renaming_leaves_no_manifest(
    job: PrepareRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_dataset(job)
    replaced = 0
    original = os.replace

    def interrupted(source: Path, target: Path) -> None:
        nonlocal replaced
        replaced += 1
        if replaced == 3:
            raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(replace(job, valid_fraction=0.5, overwrite=True))
    monkeypatch.undo()
    assert not job.manifest_path.exists()
    with pytest.raises(TrinityError, match="is there already"):
        prepare_dataset(job)
    assert prepare_dataset(replace(job, overwrite=True))[1]


def test_mistakes(job: PrepareRequest, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" ")
    empty, blank = (str(tmp_path / "empty"),), (str(tmp_path / "blank.txt"),)
    one = f"{corpus}/part0/00.txt"
    table: list[tuple[type[TrinityError], str, PrepareRequest]] = [
        (UsageError, "source nowhere is not there", replace(job, sources=("nowhere",))),
        (UsageError, "no tokenizer.json in", replace(job, tokenizer=tmp_path)),
        (UsageError, "not in", replace(job, valid_fraction=1.0)),
        (UsageError, "not in", replace(job, valid_fraction=float("nan"))),
        (UsageError, "at least one", replace(job, workers=0)),
        (UsageError, "inside source", replace(job, output=corpus / "d")),
        (TrinityError, "no documents in", replace(job, sources=empty)),
        (TrinityError, "no documents.*1 empty", replace(job, sources=blank)),
        (TrinityError, "no documents in", replace(job, glob="*.none")),
        (TrinityError, "of 1 documents none fell to", replace(job, sources=(one,))),
        (TrinityError, "cannot write into", replace(job, output=Path("/proc/nowhere/d"))),
    ]  # fmt: skip
    for kind, message, wrong in table:
        with pytest.raises(TrinityError, match=message) as caught:
            prepare_dataset(wrong)
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("out/*"))


def test_tokenizer_without_eos(job: PrepareRequest, tokenizer_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, copy)
    (copy / "special_tokens_map.json").unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"names no eos_token.*--no-append-eod"):
        prepare_dataset(replace(job, tokenizer=copy))
    made, _ = prepare_dataset(replace(job, tokenizer=copy, append_eod=False))
    assert made["tokenizer"] == {"vocab_size": 300, "eod_id": None}


def command(*arguments: object) -> list[str]:
    return [sys.executable, f"{ROOT}/tools/prepare_data.py", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_tool(
    corpus: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--source", corpus, "--tokenizer", tokenizer_dir, "--output", tmp_path / "d"]
    asked += ["--valid-fraction", "0.3", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", command(*asked)[1:])
    main = runpy.run_path(sys.argv[0])["main"]
    main()
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    lines = shown.out.splitlines()
    assert re.fullmatch(
        r"train: \d+ documents, [\d,]+ tokens, 0\.0 MB, \d\.\d\d bytes a token, "
        r"unigram entropy \d\.\d{3} nats",
        lines[0],
    )
    assert lines[1].startswith("valid: ")
    assert lines[2:] == [f"wrote {tmp_path}/d_train, {tmp_path}/d_valid"]
    main()
    again = capsys.readouterr().out.splitlines()
    assert again == [*lines[:2], f"{tmp_path}/d is prepared already; nothing to do"]


def test_tool_tells_a_mistake_in_one_line(tmp_path: Path) -> None:
    asked = ["--source", "nowhere", "--tokenizer", tmp_path, "--output", tmp_path / "d"]
    result = subprocess.run(
        command(*asked), env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: source nowhere is not there")


def test_help_has_an_example() -> None:
    shown = subprocess.run(
        command("--help"), env=environment(), capture_output=True, text=True, check=True
    )
    assert "python tools/prepare_data.py --source python-stdlib" in shown.stdout


def test_control_c_stops_the_tool_cleanly(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The whole process group gets it, as from a terminal; workers say nothing of their own."""
    source = tmp_path / "big.jsonl"
    line = json.dumps({"text": "the router sends 1234567 tokens " * 200}) + "\n"
    source.write_text(line * 10_000)
    asked = ["--source", source, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out" / "d"]
    process = subprocess.Popen(
        command(*asked, "--workers", "2"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not any(path.stat().st_size for path in tmp_path.glob("out/.d.part/train.bin")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in errors
    assert "KeyboardInterrupt" not in errors
    assert list((tmp_path / "out").iterdir()) == []
