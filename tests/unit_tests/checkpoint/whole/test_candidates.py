"""Which iterations may be loaded, and which are deleted after a save."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from megatron_trinity.checkpoint.iterations import (
    METADATA,
    find_iteration,
    iterations,
    mark_interrupted,
    number_of,
)
from megatron_trinity.checkpoint.whole.candidates import (
    discard,
    examine,
    is_empty,
    superfluous,
    sweep,
)
from megatron_trinity.checkpoint.whole.manifest import MANIFEST, write_manifest
from megatron_trinity.errors import TrinityError
from megatron_trinity.upstream.checkpoint_tracker import TRACKER


def save(directory: Path, *numbers: int) -> None:
    for number in numbers:
        path = directory / f"iter_{number:07d}"
        path.mkdir()
        (path / "__0_0.distcp").write_text(f"values of {number}")
        write_manifest(path)


def interrupt(directory: Path, *numbers: int) -> None:
    for number in numbers:
        mark_interrupted(directory / f"iter_{number:07d}")
        (directory / f"iter_{number:07d}").mkdir()


def numbers(paths: Iterable[Path]) -> list[int]:
    return [number_of(path) for path in paths]


def test_iterations_are_listed_newest_first(tmp_path: Path) -> None:
    save(tmp_path, 2, 10, 12345678)
    interrupt(tmp_path, 3)
    (tmp_path / "release").mkdir()
    (tmp_path / "iter_9").mkdir()
    (tmp_path / "iter_0000009.old").mkdir()
    (tmp_path / "iter_0000008").touch()
    assert numbers(iterations(tmp_path)) == [12345678, 10, 3, 2, 0]
    assert iterations(tmp_path)[-1].name == "release"
    assert iterations(tmp_path / "nowhere") == []


def test_whole_ones_come_without_a_fault(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    interrupt(tmp_path, 6)
    (tmp_path / "iter_0000004" / "__0_0.distcp").write_text("")
    found = {path.name: fault for path, fault in examine(tmp_path, None)}
    assert list(found) == ["iter_0000006", "iter_0000004", "iter_0000002"]
    assert found["iter_0000002"] is None
    assert "0 bytes in place of 11" in str(found["iter_0000004"])
    assert found["iter_0000006"] == "its save was interrupted"
    (tmp_path / ".iter_0000006.saving").unlink()
    fault = next(fault for _, fault in examine(tmp_path, None))
    assert fault == f"has no {MANIFEST}: it was not saved to the end"


@pytest.mark.parametrize(
    ("last", "every", "deleted"),
    [
        (1, None, [10, 8, 6, 4, 2]),
        (3, None, [6, 4, 2]),
        (9, None, []),
        (None, 4, [10, 6, 2]),
        (2, 4, [6, 2]),
    ],
)
def test_what_neither_flag_keeps_is_superfluous(
    tmp_path: Path, last: int | None, every: int | None, deleted: list[int]
) -> None:
    save(tmp_path, 2, 4, 6, 8, 10, 12)
    assert numbers(superfluous(tmp_path, last, every)) == deleted


def test_what_is_not_ours_or_may_be_needed_stays(tmp_path: Path) -> None:
    """Links, `release`, what another program has finished, and all that is newer."""
    save(tmp_path, 6, 8)
    interrupt(tmp_path, 2, 4, 9)
    (tmp_path / ".iter_0000004.saving").unlink()  # of another program
    (tmp_path / "release").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "iter_0000003").symlink_to(tmp_path / "elsewhere")
    assert numbers(superfluous(tmp_path, 1, None)) == [6, 2]
    (tmp_path / "iter_0000008" / MANIFEST).unlink()
    assert numbers(superfluous(tmp_path, 1, None)) == [2]
    (tmp_path / "iter_0000006" / MANIFEST).unlink()
    assert superfluous(tmp_path, 1, None) == []


def test_where_nothing_was_saved_to_the_end_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert is_empty(tmp_path / "nowhere")
    interrupt(tmp_path, 2, 4)
    assert is_empty(tmp_path)
    (tmp_path / TRACKER).write_text("2")
    assert not is_empty(tmp_path)
    (tmp_path / TRACKER).unlink()
    (tmp_path / "iter_0000006").mkdir()  # nobody has marked it
    assert not is_empty(tmp_path)
    write_manifest(tmp_path / "iter_0000006")
    assert not is_empty(tmp_path)


def test_a_deletion_that_ends_halfway_leaves_no_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2, 4)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        discard(tmp_path / "iter_0000004")
    assert numbers(path for path, _ in examine(tmp_path, None)) == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".iter_0000004.discarded",
        "iter_0000002",
    ]
    save(tmp_path, 4)
    discard(tmp_path / "iter_0000004")
    save(tmp_path, 4)
    mark_interrupted(tmp_path / "iter_0000004")  # interrupted behind its manifest
    mark_interrupted(tmp_path / "iter_0000001")  # before its directory was made
    interrupt(tmp_path, 3)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".iter_0000003.saving",
        "iter_0000002",
        "iter_0000003",
        "iter_0000004",
    ]


def test_of_a_link_the_link_goes(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (tmp_path / "iter_0000004").symlink_to(tmp_path / "iter_0000002")
    discard(tmp_path / "iter_0000004")
    assert numbers(iterations(tmp_path)) == [2]


def test_readers_take_the_newest_that_was_saved_to_the_end(tmp_path: Path) -> None:
    """Whatever the pointer names, as training does; it counts where there is no manifest at all."""
    save(tmp_path, 2, 4)
    interrupt(tmp_path, 6)
    for number in (2, 4, 6):
        (tmp_path / f"iter_{number:07d}" / METADATA).touch()
    for pointer in ("2", "4", "6", "9", "release"):
        (tmp_path / TRACKER).write_text(pointer)
        assert find_iteration(tmp_path) == tmp_path / "iter_0000004"
    (tmp_path / TRACKER).unlink()
    assert find_iteration(tmp_path) == tmp_path / "iter_0000004"
    assert find_iteration(tmp_path / "iter_0000002") == tmp_path / "iter_0000002"
    for number in (2, 4):
        (tmp_path / f"iter_{number:07d}" / MANIFEST).unlink()
    (tmp_path / TRACKER).write_text("2")
    assert find_iteration(tmp_path) == tmp_path / "iter_0000002"
    save(tmp_path, 8)
    with pytest.raises(TrinityError, match=r"iter_0000008 is the newest that was saved, which has"):
        find_iteration(tmp_path)
