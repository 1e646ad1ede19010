"""The pointer to the newest checkpoint is replaced whole, or stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_trinity.upstream.checkpoint_tracker import TRACKER, replacing


def test_the_new_content_is_there_once_it_is_whole(tmp_path: Path) -> None:
    pointer = tmp_path / TRACKER
    pointer.write_text("10")
    with replacing(pointer) as stream:
        stream.write("20")
        stream.flush()
        assert pointer.read_text() == "10"
    assert pointer.read_text() == "20"
    assert [path.name for path in tmp_path.iterdir()] == [TRACKER]


def test_a_failure_leaves_the_old_content(tmp_path: Path) -> None:
    pointer = tmp_path / TRACKER
    pointer.write_text("10")
    with pytest.raises(UnicodeEncodeError), replacing(pointer) as stream:
        stream.write("2\udcff")
    assert pointer.read_text() == "10"
    assert [path.name for path in tmp_path.iterdir()] == [TRACKER]


def test_megatron_writes_the_pointer_that_way_and_nothing_else(tmp_path: Path) -> None:
    from megatron.training import checkpointing

    (tmp_path / TRACKER).write_text("10")
    with checkpointing.maybe_msc.open(str(tmp_path / TRACKER), "w") as stream:
        stream.write("20")
        assert (tmp_path / TRACKER).read_text() == "10"
    with checkpointing.maybe_msc.open(str(tmp_path / TRACKER), "r") as stream:
        assert stream.read() == "20"
    with checkpointing.maybe_msc.open(str(tmp_path / "other"), "w") as stream:
        assert (tmp_path / "other").read_text() == ""
        stream.write("now")
    assert checkpointing.maybe_msc.os.path.exists(str(tmp_path / "other"))
