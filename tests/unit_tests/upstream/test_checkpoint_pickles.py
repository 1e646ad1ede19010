"""Pickles in a checkpoint are data: one that would execute something is refused, unexecuted."""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_trinity.checkpoint.torch_dist.read import (
    COMMON,
    TorchDistCheckpoint,
    TorchDistTensors,
)
from megatron_trinity.checkpoint.torch_dist.write import (
    finish,
    object_items,
    plan_files,
    write_file,
)
from megatron_trinity.errors import TrinityError
from megatron_trinity.upstream.checkpoint_pickles import load_metadata, load_object
from tests.checkpoints import Payload

ARGS = Namespace(num_dense_layers=1, params_dtype=torch.bfloat16)


def write_checkpoint(directory: Path, common: object) -> Path:
    """An iteration that consists of nothing but its common state."""
    directory.mkdir()
    items, resolve = object_items({COMMON: common})
    plans, metadata = plan_files(directory, [items])
    finish(directory, metadata, [write_file(directory, plans[0], resolve)])
    return directory


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def test_the_payload_of_these_tests_works(trace: Path) -> None:
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.is_dir()


def test_malicious_metadata_leaves_no_trace(tmp_path: Path, trace: Path) -> None:
    path = write_checkpoint(tmp_path / "c", {"args": ARGS, "iteration": 3})
    assert TorchDistCheckpoint(path).iteration == 3
    (path / ".metadata").write_bytes(pickle.dumps(Payload(trace)))
    with pytest.raises(TrinityError) as refused:
        TorchDistCheckpoint(path)
    assert str(refused.value) == (
        f"{path} cannot be read as a checkpoint: a pickle in it names posix.mkdir, which no "
        "checkpoint consists of; nothing was executed"
    )
    with pytest.raises(Exception, match=r"posix\.mkdir"):
        FileSystemReader(path).read_metadata()
    with pytest.raises(BaseException, match=r"posix\.mkdir"):  # no subclass of Exception
        dist_checkpointing.load_common_state_dict(str(path))
    assert not trace.exists()


def test_malicious_common_state_leaves_no_trace(tmp_path: Path, trace: Path) -> None:
    path = write_checkpoint(tmp_path / "c", {"args": Payload(trace), "iteration": 3})
    with pytest.raises(TrinityError, match=r"c: common_state/shard_0_1 .*posix\.mkdir, which no"):
        TorchDistCheckpoint(path)
    with pytest.raises(BaseException, match=r"posix\.mkdir"):  # no subclass of Exception
        dist_checkpointing.load_common_state_dict(str(path))
    assert not trace.exists()


def test_a_malicious_common_pt_leaves_no_trace(tmp_path: Path, trace: Path) -> None:
    path = write_checkpoint(tmp_path / "c", {"args": ARGS, "iteration": 3})
    torch.save({"args": ARGS, "iteration": 4}, path / "common.pt")
    assert TorchDistCheckpoint(path).iteration == 4
    torch.save({"args": Payload(trace), "iteration": 4}, path / "common.pt")
    with pytest.raises(TrinityError, match=r"common\.pt cannot be read: .*posix\.mkdir, which no"):
        TorchDistCheckpoint(path)
    with pytest.raises(pickle.UnpicklingError):
        dist_checkpointing.load_common_state_dict(str(path))
    assert not trace.exists()


def test_objects_of_any_key_are_refused(tmp_path: Path, trace: Path) -> None:
    path = tmp_path / "c"
    path.mkdir()
    items, resolve = object_items({"rng_state/shard_0.0_1.1": Payload(trace)})
    plans, metadata = plan_files(path, [items])
    finish(path, metadata, [write_file(path, plans[0], resolve)])
    with pytest.raises(TrinityError, match=r"rng_state/shard_0\.0_1\.1 cannot be read"):
        TorchDistTensors(path).object("rng_state/shard_0.0_1.1")
    state = {"rng_state/shard_0.0_1.1": io.BytesIO()}
    with pytest.raises(BaseException, match=r"posix\.mkdir"):  # no subclass of Exception
        load(state, storage_reader=FileSystemReader(path), no_dist=True)
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["posix.mkdir", "torch.load", "torch.Size.__class__", "torch.serialization.load"]
)
def test_names_beside_those_of_metadata_are_refused(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    if name.endswith("__class__"):
        module, attribute = "torch", "Size.__class__"
    code = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, attribute)
    )
    with pytest.raises(pickle.UnpicklingError, match="nothing was executed"):
        load_metadata(io.BytesIO(code + b"\x93."))


def test_metadata_of_every_kind_of_entry_is_read() -> None:
    tensor = TensorStorageMetadata(
        TensorProperties(dtype=torch.float8_e4m3fn),
        torch.Size([2, 3]),
        [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))],
    )
    metadata = Metadata(
        {"a": tensor, "b": BytesStorageMetadata()},
        storage_data={MetadataIndex("a", torch.Size([0, 0])): "place"},
    )
    assert load_metadata(io.BytesIO(pickle.dumps(metadata))) == metadata


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_path_is_read_from_every_version_of_python(module: str) -> None:
    code = f"c{module}\nPosixPath\n(Va\nVb\ntR.".encode()
    assert load_metadata(io.BytesIO(code)) == Path("a/b")


def test_plain_objects_are_read() -> None:
    stream = io.BytesIO()
    saved = [
        {"a": torch.arange(3), "b": (1, "x", None), "c": ARGS, "d": np.arange(2, dtype=np.uint32)}
    ]
    torch.save(saved, stream)
    stream.seek(0)
    [read] = load_object(stream)
    assert torch.equal(read["a"], torch.arange(3))
    assert (read["b"], read["c"], read["d"].tolist()) == ((1, "x", None), ARGS, [0, 1])


def test_a_damaged_object_is_told_in_one_line() -> None:
    stream = io.BytesIO()
    torch.save([1], stream)
    with pytest.raises(Exception) as failed:
        load_object(io.BytesIO(stream.getvalue()[:100]))
    assert "\n" not in str(failed.value)
