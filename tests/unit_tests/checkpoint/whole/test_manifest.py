"""The manifest says exactly what a directory must hold, and finds every difference."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_trinity.checkpoint.whole.manifest import (
    MANIFEST,
    FileSum,
    faults,
    read_manifest,
    write_manifest,
)
from megatron_trinity.errors import TrinityError
from tests.checkpoints import check_whole

FILES = {"a.distcp": b"some bytes", ".metadata": b"", "common.pt": b"\x00\x01"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path)
    return tmp_path


def test_it_names_each_file_with_size_and_checksum(directory: Path) -> None:
    assert read_manifest(directory) == {
        name: FileSum(len(content), hashlib.sha256(content).hexdigest())
        for name, content in FILES.items()
    }
    check_whole(directory, checksums=True)


def test_known_sums_are_not_read_again(directory: Path) -> None:
    known = FileSum(10, "of the writer")
    write_manifest(directory, {"a.distcp": known})
    assert read_manifest(directory)["a.distcp"] == known


def test_another_size_is_found_without_reading(directory: Path) -> None:
    (directory / "a.distcp").write_bytes(b"some byte")
    with pytest.raises(TrinityError, match=r"not whole: a.distcp has 9 bytes in place of 10$"):
        check_whole(directory, checksums=False)


def test_a_flipped_bit_is_found_by_its_checksum(directory: Path) -> None:
    (directory / "a.distcp").write_bytes(b"some bytez")
    check_whole(directory, checksums=False)
    with pytest.raises(TrinityError, match=r"a.distcp has another content than was saved"):
        check_whole(directory, checksums=True)


def test_what_was_put_there_later_is_found_unless_hidden(directory: Path) -> None:
    (directory / ".nfs0001").touch()
    check_whole(directory, checksums=True)
    (directory / "common.pt.bak").touch()
    with pytest.raises(TrinityError, match=r"common.pt.bak was not saved with it"):
        check_whole(directory, checksums=True)


def test_every_fault_is_named(directory: Path) -> None:
    (directory / "a.distcp").unlink()
    (directory / "common.pt").write_bytes(b"")
    assert list(faults(directory, read_manifest(directory), checksums=True)) == [
        "a.distcp is missing",
        "common.pt has 0 bytes in place of 2",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({"version": 1, "files": {"a": {"bytes": 1}}}), "cannot be read"),
        (json.dumps({"version": 2, "files": {}}), "is of version 2, this reads 1"),
    ],
)
def test_what_is_no_manifest_is_refused(directory: Path, content: str, message: str) -> None:
    (directory / MANIFEST).write_text(content)
    with pytest.raises(TrinityError, match=message):
        read_manifest(directory)


def test_a_directory_without_one_was_not_saved_to_the_end(tmp_path: Path) -> None:
    with pytest.raises(TrinityError, match=r"has no manifest\.json: it was not saved to the end"):
        read_manifest(tmp_path)
