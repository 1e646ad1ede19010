"""A checkpoint that is rewritten has the same values; a bad one is refused, and nothing changes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_trinity.checkpoint import reshard as module
from megatron_trinity.checkpoint.inspect import inspect_checkpoint
from megatron_trinity.checkpoint.layout_args import parse_layout_text
from megatron_trinity.checkpoint.reshard import FILE_SHARE, SLICE_SHARE, reshard
from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint
from megatron_trinity.checkpoint.whole.hold import holding
from megatron_trinity.checkpoint.whole.manifest import write_manifest
from megatron_trinity.errors import TrinityError, UsageError
from tests.checkpoints import (
    Payload,
    edit_metadata,
    flip_bit,
    model_args,
    model_tensors,
    read_tensors,
    run_tool,
    write_checkpoint,
)

TOOL = "tools/reshard.py"
COMMON = {
    "optimizer": {"step": 2},
    "opt_param_scheduler": {"num_steps": 16},
    "rerun_state_machine": {"mode": "disabled"},
}
OBJECTS = {
    "rng_state/shard_0.0_1.1": [{"torch_rng_state": torch.arange(5)}],
    "rerun_state_machine_state/shard_0_1": {"sharded": True},
    "decoder.layers.1.mlp.linear_fc1._extra_state/shard_0_1": None,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    tensors = {k: t for k, t in model_tensors(dtype=torch.bfloat16).items() if ".layers.3" not in k}
    write_checkpoint(run, tensors, model_args(), files=3, common=COMMON, objects=OBJECTS)
    return run


def snapshot(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def test_values_are_the_same_bit_by_bit_in_other_files(run: Path, tmp_path: Path) -> None:
    before = snapshot(run)
    done = reshard(run, tmp_path / "new", files=5)
    assert snapshot(run) == before
    old, new = read_tensors(run / "iter_0000002"), read_tensors(done.target)
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        assert new[key].dtype == tensor.dtype
        assert torch.equal(new[key], tensor), key
    assert done.target == tmp_path / "new" / "iter_0000002"
    assert done.nbytes == sum(tensor.nbytes for tensor in old.values())
    assert done.notes == []
    sizes = [path.stat().st_size for path in sorted(done.target.glob("*.distcp"))]
    assert done.files == 5
    assert len(sizes) == 6, "and one of objects"
    assert max(sizes) < 1.5 * sum(sizes) / 5
    assert inspect_checkpoint(tmp_path / "new", checksums=True).is_whole
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "iter_0000002",
        "latest_checkpointed_iteration.txt",
    ]
    assert (tmp_path / "new" / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_everything_else_is_kept_without_a_layout(run: Path, tmp_path: Path) -> None:
    new = TorchDistCheckpoint(reshard(run, tmp_path / "new").target)
    old = TorchDistCheckpoint(run)
    assert new.common == old.common
    assert new.object_keys() == old.object_keys()
    for key in old.object_keys():
        assert new.object_bytes(key) == old.object_bytes(key) or key.startswith("common_state")
    assert torch.equal(
        new.object("rng_state/shard_0.0_1.1")[0][0]["torch_rng_state"], torch.arange(5)
    )


@pytest.mark.parametrize(
    ("layout", "rng", "rerun"),
    [("tp=1", True, True), ("ep=2", True, False), ("dp=2", True, False), ("tp=2", False, False)],
)
def test_what_belongs_to_ranks_goes_where_they_change(
    run: Path, tmp_path: Path, layout: str, rng: bool, rerun: bool
) -> None:
    new = TorchDistCheckpoint(reshard(run, tmp_path / "new", parse_layout_text(layout)).target)
    kinds = {key.partition("/")[0] for key in new.object_keys()}
    assert ("rng_state" in kinds) == rng
    assert ("rerun_state_machine_state" in kinds) == ("rerun_state_machine" in new.common) == rerun
    assert bool(new.args.no_save_rng) != rng
    assert "decoder.layers.1.mlp.linear_fc1._extra_state" in kinds
    assert new.common["optimizer"] == {"step": 2}
    expected = parse_layout_text(layout)
    assert new.args.tensor_model_parallel_size == expected.size("tp")
    assert new.args.expert_model_parallel_size == expected.size("ep")
    assert new.args.world_size == expected.ranks


def test_weights_alone(run: Path, tmp_path: Path) -> None:
    done = reshard(run, tmp_path / "new", optimizer=False)
    assert done.notes == ["no optimizer state: load it with --no-load-optim or --finetune"]
    new = TorchDistCheckpoint(done.target)
    old = read_tensors(run / "iter_0000002")
    assert new.tensor_keys() == sorted(key for key in old if not key.startswith("optimizer."))
    assert not new.has_optimizer
    assert new.args.no_save_optim
    assert "optimizer" not in new.common
    assert all(torch.equal(new.tensor(key), old[key]) for key in new.tensor_keys())


@pytest.mark.slow
def test_memory_bounds_slices_and_files(run: Path, tmp_path: Path) -> None:
    memory = SLICE_SHARE * 8000
    done = reshard(run, tmp_path / "new", memory_bytes=memory)
    new = TorchDistCheckpoint(done.target)
    for key in new.tensor_keys():
        for chunk in new.chunks(key):
            assert chunk.sizes.numel() * new.dtype(key).itemsize <= 8000
    for path in done.target.glob("*.distcp"):  # headers aside
        assert path.stat().st_size < 2 * memory / FILE_SHARE
    assert all(
        torch.equal(new.tensor(key), tensor)
        for key, tensor in read_tensors(run / "iter_0000002").items()
    )
    with pytest.raises(UsageError, match=r"--files 2: .* use \d+ or more"):
        reshard(run, tmp_path / "few", files=2, memory_bytes=memory)


def test_an_interrupted_run_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module.write_file
    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(module, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reshard(run, tmp_path / "new", files=4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".iter_0000002.part"]
    done = reshard(run, tmp_path / "new", files=4)
    assert len(calls) == 3 + 2 + 1, "two files, and that of objects"
    assert inspect_checkpoint(done.target, checksums=True).is_whole
    new = read_tensors(done.target)
    assert all(torch.equal(new[k], t) for k, t in read_tensors(run / "iter_0000002").items())


@pytest.mark.slow
def test_several_processes(run: Path, tmp_path: Path) -> None:
    done = reshard(run, tmp_path / "new", files=3, workers=2)
    new = read_tensors(done.target)
    assert all(torch.equal(new[k], t) for k, t in read_tensors(run / "iter_0000002").items())


def remove_a_file(path: Path) -> None:
    (path / "__1_0.distcp").unlink()


def cut_a_file(path: Path) -> None:
    (path / "__1_0.distcp").write_bytes((path / "__1_0.distcp").read_bytes()[:-9])


def flip_a_bit(path: Path) -> None:
    flip_bit(path / "__1_0.distcp")


def lose_a_chunk(path: Path) -> None:
    edit_metadata(path, lambda m: m.state_dict_metadata["output_layer.weight"].chunks.pop())
    write_manifest(path)


def spoil_metadata(path: Path) -> None:
    (path / ".metadata").write_bytes(b"no pickle")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove_a_file, "is not whole: __1_0.distcp is missing"),
        (cut_a_file, "is not whole: __1_0.distcp has "),
        (flip_a_bit, "is not whole: __1_0.distcp has another content"),
        (lose_a_chunk, "is not whole: output_layer.weight: its chunks do not cover"),
        (spoil_metadata, "cannot be read as a checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    run: Path, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    damage(run / "iter_0000002")
    before = snapshot(tmp_path)
    with pytest.raises(TrinityError) as refused:
        reshard(run, tmp_path / "new")
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 1
    assert snapshot(tmp_path) == before


def test_without_a_manifest_contents_are_not_checked(run: Path, tmp_path: Path) -> None:
    (run / "iter_0000002" / "manifest.json").unlink()
    done = reshard(run, tmp_path / "new")
    assert done.notes == [f"{run / 'iter_0000002'} has no manifest.json: contents are not checked"]
    remove_a_file(run / "iter_0000002")
    with pytest.raises(TrinityError, match=r"not whole: __1_0\.distcp is missing"):
        reshard(run, tmp_path / "newer")


def test_a_target_that_is_there(run: Path, tmp_path: Path) -> None:
    for name in ("iter_0000002/x", "latest_checkpointed_iteration.txt"):
        save = tmp_path / name.replace("/", "-")
        (save / name).parent.mkdir(parents=True)
        (save / name).write_text("2")
        before = snapshot(tmp_path)
        with pytest.raises(TrinityError, match="is there already and is not replaced"):
            reshard(run, save)
        assert snapshot(tmp_path) == before


def test_a_directory_that_a_run_holds(run: Path, tmp_path: Path) -> None:
    with (
        holding(tmp_path / "new"),
        pytest.raises(TrinityError, match=f"^{tmp_path / 'new'} is in use: it is held by process"),
    ):
        reshard(run, tmp_path / "new")
    with holding(run):
        reshard(run, tmp_path / "new")  # which only reads that one
    assert not list((tmp_path / "new").glob(".held_*"))


def test_a_path_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = snapshot(tmp_path)
    with pytest.raises(TrinityError, match=r"cannot write into .*/file/new: Not a directory"):
        reshard(run, tmp_path / "file" / "new")
    assert snapshot(tmp_path) == before


def test_a_dry_run_writes_nothing(run: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    done = reshard(run, tmp_path / "new", parse_layout_text("tp=2"), files=2, dry_run=True)
    assert snapshot(tmp_path) == before
    assert done == reshard(run, tmp_path / "new", parse_layout_text("tp=2"), files=2)


def test_objects_that_are_more_than_data_are_refused(run: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    payload = f"cos\nmkdir\n(V{trace}\ntR."
    pickle.loads(payload.encode())
    trace.rmdir()

    bad = tmp_path / "bad"
    objects = {"rng_state/shard_0.0_1.1": Payload(trace)}
    write_checkpoint(bad, {"a": torch.ones(2, 2)}, model_args(), objects=objects)
    with pytest.raises(TrinityError, match=r"rng_state/shard_0\.0_1\.1 .*nothing was executed"):
        reshard(bad, tmp_path / "new")
    assert not trace.exists()
    assert not (tmp_path / "new").exists()


def test_the_command_line(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--load", run, "--save", tmp_path / "new", "--to", "tp=2,ep=2", "--files", 2]
    assert run_tool(TOOL, [*words, "--dry-run"], monkeypatch) == (0, "")
    assert run_tool(TOOL, [*words, "--workers", 1], monkeypatch) == (0, "")
    said = [
        line for line in capsys.readouterr().out.splitlines() if "write" in line or "wrote" in line
    ]
    assert said[0] == said[1].replace("wrote", "would write")
    assert said[1].startswith(f"wrote {tmp_path / 'new' / 'iter_0000002'}: ")
    assert said[1].endswith(" MB of tensors in 2 files")
    manifest = json.loads((tmp_path / "new/iter_0000002/manifest.json").read_text())
    assert ".metadata" in manifest["files"]


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--to", "gpus=2"], 2, "--to: 'gpus=2' is no part of a layout"),
        (["--files", "0"], 2, "--files 0: use 1 or more"),
        (["--memory-gb", "-1"], 2, "have to be positive"),
        (["--format", "torch", "--files", "2"], 2, "--format torch has a file a rank"),
        (["--to", "tp=2"], 1, "absent holds no checkpoint"),
    ],
)
def test_bad_command_lines(
    words: list[str], code: int, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_tool(TOOL, ["--load", "absent", "--save", "absent/new", *words], monkeypatch)
    assert found[0] == code
    assert named in found[1]
    assert not Path("absent").exists()
