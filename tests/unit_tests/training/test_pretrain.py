"""What the entry point sees to around Megatron's loop."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from megatron_trinity.training import pretrain


def test_scalars_are_written_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = RecordWriter.write, []

    def slow(writer: RecordWriter, data: bytes) -> None:
        time.sleep(0.3)  # as where the thread that writes does not get to run
        write(writer, data)
        written.append(data)

    monkeypatch.setattr(RecordWriter, "write", slow)
    writer = SummaryWriter(tmp_path)
    monkeypatch.setattr(pretrain, "get_tensorboard_writer", lambda: writer)

    def train() -> None:
        writer.add_scalar("the last loss", 0.5, 4)
        raise SystemExit(0)  # as behind --exit-interval

    with pytest.raises(SystemExit), pretrain.written_scalars():
        train()
    assert any(b"the last loss" in data for data in written)


def test_a_rank_without_a_writer_has_nothing_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "get_tensorboard_writer", lambda: None)
    with pretrain.written_scalars():
        pass
