"""A run that is killed leaves nothing alive, and the same command goes on to the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_trinity.data import chunks, prepare, work
from megatron_trinity.data.documents import SkipReport
from megatron_trinity.data.manifest import held_directory
from megatron_trinity.data.prepare import PrepareRequest, prepare_dataset
from megatron_trinity.errors import TrinityError
from tests.crosses import first
from tests.paths import ROOT

TOOL = """
import sys
from megatron_trinity.data import chunks, prepare
chunks.CHUNK_BYTES, prepare.SECONDS_BETWEEN_JOURNALS = 20_000, 0.0
from pathlib import Path
from megatron_trinity.errors import run_command
source, tokenizer, output, workers = sys.argv[1:]
request = prepare.PrepareRequest(
    (source,), Path(tokenizer), Path(output), valid_fraction=0.3, workers=int(workers)
)
run_command(lambda: prepare.prepare_dataset(request) and None)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Bad lines among good ones, and files before and behind."""
    root = tmp_path / "in"
    root.mkdir()
    texts = [f"{i}: the router sends 1234567 tokens " * 20 for i in range(1600)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[10::200] = [""] * 8
    (root / "b.jsonl").write_text("\n".join(lines))
    for name in ("a.txt", "c.txt"):
        (root / name).write_text(f"{name}, a text file")
    return root


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def start(source: Path, tokenizer: Path, output: Path, workers: int) -> subprocess.Popen[str]:
    arguments = [str(source), str(tokenizer), str(output), str(workers)]
    return subprocess.Popen(
        [sys.executable, "-c", TOOL, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("workers", "kills"), first(0, [(2, 1), (2, 4), (1, 2)]))
def test_kill_leaves_nothing_alive_and_the_same_command_goes_on(
    workers: int, kills: int, source: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    request = PrepareRequest((str(source),), tokenizer_dir, tmp_path / "whole" / "d")
    whole, _ = prepare_dataset(replace(request, valid_fraction=0.3))
    output = tmp_path / "out" / "d"
    journal = tmp_path / "out" / ".d.part" / "journal.npz"

    def journaled() -> int:
        found = work.read_journal(journal.parent)
        return found.source_bytes if found else 0

    reached = 0
    for _ in range(kills):
        process = start(source, tokenizer_dir, output, workers)
        while journaled() <= reached:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= (workers if workers > 1 else 0)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == []
        reached = journaled()
    process = start(source, tokenizer_dir, output, workers)
    assert process.wait() == 0
    assert files_of(output.parent) == files_of(request.output.parent)
    assert whole["skipped"]["empty or only white space"]["count"] == 8


def interrupted(request: PrepareRequest, after: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stop after a number of chunks; return the list that counts those that are encoded."""
    encoded: list[int] = []
    original = prepare.encode_in_order

    def counted(*arguments: Any) -> Any:
        for number, result in enumerate(original(*arguments)):
            if number == after and not encoded[after:]:
                raise KeyboardInterrupt
            encoded.append(number)
            yield result

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(chunks, "_BLOCK", 20_000)
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_JOURNALS", 0.0)
    monkeypatch.setattr(prepare, "encode_in_order", counted)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(request)
    return encoded


def test_what_was_done_is_not_done_again(
    source: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = PrepareRequest((str(source),), tokenizer_dir, tmp_path / "whole" / "d")
    prepare_dataset(request)
    other = replace(request, output=tmp_path / "out" / "d")
    encoded = interrupted(other, 30, monkeypatch)
    assert encoded == list(range(30))
    assert [path.name for path in other.output.parent.iterdir()] == [".d.part"]
    prepare_dataset(other)
    again = encoded[30:]
    files = prepare._files(other, SkipReport())
    assert 30 + len(again) == len(list(chunks.chunks_of(files, "text")))
    assert files_of(other.output.parent) == files_of(request.output.parent)


def test_work_on_another_request_is_not_gone_on_with(
    source: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = PrepareRequest((str(source),), tokenizer_dir, tmp_path / "out" / "d")
    interrupted(request, 20, monkeypatch)
    changed = replace(request, valid_fraction=0.2)
    made, _ = prepare_dataset(changed)
    alone, _ = prepare_dataset(replace(changed, output=tmp_path / "alone" / "d"))
    assert made == alone
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")


def test_two_processes_do_not_prepare_the_same_output(
    source: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    request = PrepareRequest((str(source),), tokenizer_dir, tmp_path / "out" / "d")
    part = tmp_path / "out" / ".d.part"
    with (
        held_directory(part, "free"),
        pytest.raises(TrinityError, match="another process prepares"),
    ):
        prepare_dataset(request)
    prepare_dataset(request)
    assert not part.exists()


def test_leftover_of_a_kill_behind_the_result_goes(
    source: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    request = PrepareRequest((str(source),), tokenizer_dir, tmp_path / "out" / "d")
    prepare_dataset(request)
    part = tmp_path / "out" / ".d.part"
    part.mkdir()
    assert not prepare_dataset(request)[1]
    assert not part.exists()
