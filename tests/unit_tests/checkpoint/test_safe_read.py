"""Nothing that a checkpoint's pickles name is run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, save
from torch.distributed.checkpoint.metadata import Metadata

from megatron_trinity.checkpoint.safe_read import read_common_state, read_metadata


class Payload:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def test_metadata_is_what_torch_reads(tmp_path: Path) -> None:
    state = {"a": torch.zeros(3, 2, dtype=torch.bfloat16), "b": {"c": 1}}
    save(state, checkpoint_id=tmp_path, no_dist=True)
    ours, theirs = read_metadata(tmp_path), FileSystemReader(tmp_path).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data


@pytest.mark.parametrize("function", [os.mkdir, torch.hub.load, eval])
def test_a_payload_in_metadata_is_not_run(tmp_path: Path, function: Callable[..., Any]) -> None:
    payload = Payload(function, str(tmp_path / "mark"))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, planner_data=payload)))
    with pytest.raises(pickle.UnpicklingError, match="does not belong there"):
        read_metadata(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_a_name_within_a_module_is_no_way_around(tmp_path: Path) -> None:
    """`os` is a name in torch's module, and a pickle can ask for `os.mkdir` in it."""
    module, name = "torch.distributed.checkpoint.filesystem", "os.mkdir"
    stream = pickle.PROTO + b"\x04"
    for text in (module, name):
        stream += pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()
    stream += pickle.STACK_GLOBAL + pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.STOP
    (tmp_path / ".metadata").write_bytes(stream)
    with pytest.raises(pickle.UnpicklingError, match="does not belong there"):
        read_metadata(tmp_path)


def test_a_payload_in_the_common_state_is_not_run(tmp_path: Path) -> None:
    torch.save({"args": Payload(os.mkdir, str(tmp_path / "mark"))}, tmp_path / "common.pt")
    with pytest.raises(pickle.UnpicklingError):
        read_common_state(tmp_path)
    assert not (tmp_path / "mark").exists()
