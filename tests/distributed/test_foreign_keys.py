"""A checkpoint that lacks what the model has is refused, but for objects beside weights."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.broken_runs import flags_of, train
from tests.distributed.pool import RankPools
from tests.trainer import write_dataset

WEIGHT = "layers.1.self_attention.linear_qkv.weight"
FILES = ("--ckpt-format", "torch", "--no-load-rng")


@pytest.fixture(scope="module")
def folder(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and runs of one step: `torch_dist`, and `torch`, of a file for each rank."""
    folder = tmp_path_factory.mktemp("keys")
    write_dataset(folder / "data")
    for name, flags in (("torch_dist", ()), ("torch", FILES)):
        first = flags_of(folder, folder / name, "--exit-interval", "1", *flags)
        assert ranks.run(train, first, world_size=1)[0][:2] == (0, "")
    return folder


def lacking(folder: Path, run: Path, ckpt_format: str, lacks: str) -> None:
    """A copy of a run, as if of another trainer, whose checkpoint lacks some keys."""
    shutil.copytree(folder / ckpt_format, run)
    iteration = run / "iter_0000001"
    (iteration / "manifest.json").unlink()
    if ckpt_format == "torch":
        [file] = iteration.rglob("*.pt")
        state = torch.load(file, weights_only=False)
        kept = {key: value for key, value in state["model"].items() if lacks not in key}
        assert len(kept) < len(state["model"])
        torch.save({**state, "model": kept}, file)
        return
    stored = FileSystemReader(iteration).read_metadata()
    entries, places = stored.state_dict_metadata, stored.storage_data
    stored.state_dict_metadata = {key: entries[key] for key in entries if lacks not in key}
    stored.storage_data = {index: places[index] for index in places if lacks not in index.fqn}
    assert len(stored.state_dict_metadata) < len(entries)
    (iteration / ".metadata").write_bytes(pickle.dumps(stored))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ckpt_format", "lacks", "says"),
    [
        ("torch", WEIGHT, f"could not be loaded: the model's state lacks decoder.{WEIGHT};"),
        ("torch", "_extra_state", ""),
        ("torch_dist", WEIGHT, f"decoder.{WEIGHT} from model not in state dict"),
        ("torch_dist", "_extra_state", "Missing key in checkpoint state_dict: decoder."),
    ],
)
def test_what_a_checkpoint_lacks(
    ranks: RankPools, folder: Path, tmp_path: Path, ckpt_format: str, lacks: str, says: str
) -> None:
    """Not strictly, Megatron would go on with the initial values of a missing weight."""
    lacking(folder, tmp_path / "run", ckpt_format, lacks)
    flags = flags_of(folder, tmp_path / "run", "--ckpt-step", "1", "--exit-interval", "2")
    files = FILES if ckpt_format == "torch" else ()
    code, error, printed = ranks.run(train, [*flags, *files], world_size=1)[0]
    assert "load_return" not in printed
    assert (code, error == "") == ((1, False) if says else (0, True))
    assert says in error
    assert "\n" not in error
