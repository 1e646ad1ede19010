"""What the inspection says is what was saved, and it finds every way of not being whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from megatron_trinity.checkpoint.inspect import inspect_checkpoint, iterations_of
from megatron_trinity.checkpoint.whole.manifest import write_manifest
from megatron_trinity.errors import TrinityError
from megatron_trinity.planning.parameters import total_parameters
from megatron_trinity.planning.sizes import ModelSizes
from tests.checkpoints import (
    edit_metadata,
    model_args,
    model_tensors,
    run_tool,
    write_checkpoint,
)

TOOL = "tools/inspect_checkpoint.py"
KEY = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
FLAGS = ("--bf16", "--optimizer", "muon", "--adamw-lr", "1e-3", "--use-distributed-optimizer")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, model_tensors(dtype=torch.bfloat16), model_args(*FLAGS))
    return tmp_path


@pytest.fixture
def iteration(run: Path) -> Path:
    return run / "iter_0000002"


def test_it_says_what_was_saved(run: Path, iteration: Path) -> None:
    found = inspect_checkpoint(run, checksums=True)
    assert found == inspect_checkpoint(iteration)
    assert found.is_whole
    assert (found.path, found.iteration) == (str(iteration), 2)
    assert (found.samples, found.tokens) == (16, 16 * 64)
    assert found.model["num_layers"] == 5
    assert found.model["num_dense_layers"] == 1
    assert found.model["sliding_window"] == 7
    assert (found.layout["TP"], found.layout["VPP"], found.layout["DP"]) == (1, None, 1)
    assert found.optimizer["optimizer"] == "muon"
    assert found.optimizer["precision"] == "bf16"
    assert found.optimizer["sharded"]
    assert found.files == {file.name: file.stat().st_size for file in iteration.iterdir()}


def test_parameters_by_group(run: Path) -> None:
    found = inspect_checkpoint(run).parameters
    assert sum(found.values()) == total_parameters(ModelSizes.from_args(model_args()))
    assert found["embedding"] == found["LM head"] == 160 * 64
    assert found["attention"] == 5 * (64 * (3 * 64 + 2 * 32))
    assert found["router"] == 4 * 8 * 64
    assert found["dense MLP"] == 3 * 64 * 96
    assert found["shared experts"] == 4 * 3 * 64 * 48
    assert found["routed experts"] == 4 * 8 * 3 * 64 * 48
    assert found["norms"] == 64 + 5 * (4 * 64 + 2 * 16)
    assert "other" not in found


def test_bytes_by_kind_and_dtype(run: Path) -> None:
    found = inspect_checkpoint(run)
    parameters = sum(found.parameters.values())
    vectors = found.parameters["norms"]
    biases = 4 * 8
    assert found.tensor_bytes == {
        "model": {"bfloat16": 2 * (parameters - vectors), "float32": 4 * (vectors + biases)},
        "optimizer": {"float32": 2 * 4 * parameters},
    }
    tensors = 2 * (parameters - vectors) + 4 * (vectors + biases) + 8 * parameters
    assert found.rest_bytes == sum(found.files.values()) - tensors


def drop_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata[KEY].chunks.pop()


def double_chunk(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata[KEY].chunks
    chunks.append(chunks[0])


def move_chunk(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata[KEY].chunks
    moved = ChunkStorageMetadata(torch.Size([8, 0, 0]), chunks[0].sizes)
    place = metadata.storage_data.pop(MetadataIndex(KEY, chunks[0].offsets))
    metadata.storage_data[MetadataIndex(KEY, moved.offsets)] = place
    chunks[0] = moved


def lose_place(metadata: Any) -> None:
    del metadata.storage_data[MetadataIndex(KEY, torch.Size([0, 0, 0]))]


def leave_the_directory(metadata: Any) -> None:
    place = metadata.storage_data[MetadataIndex(KEY, torch.Size([0, 0, 0]))]
    object.__setattr__(place, "relative_path", "../other")


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (drop_chunk, f"{KEY}: its chunks do not cover the whole tensor of shape [8, 96, 64]"),
        (double_chunk, f"{KEY}: its chunks overlap"),
        (move_chunk, f"{KEY}: its chunk at [8, 0, 0] ends outside of its shape [8, 96, 64]"),
        (lose_place, f"{KEY}: its chunk at [0, 0, 0] is in no file"),
        (leave_the_directory, ".metadata names the file ../other, which is outside"),
    ],
)
def test_metadata_that_names_what_is_not_there(
    iteration: Path, edit: Callable[[Any], None], fault: str
) -> None:
    edit_metadata(iteration, edit)
    write_manifest(iteration)
    [found] = inspect_checkpoint(iteration).faults
    assert found.startswith(fault)


def test_a_file_that_is_too_short(iteration: Path) -> None:
    file = iteration / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert inspect_checkpoint(iteration).faults == [
        f"__0_0.distcp has {len(whole) - 1} bytes in place of {len(whole)}",
        f"__0_0.distcp has {len(whole) - 1} bytes, .metadata names values up to byte {len(whole)}",
    ]


def test_files_that_are_missing(iteration: Path) -> None:
    (iteration / "__1_0.distcp").unlink()
    assert inspect_checkpoint(iteration).faults == ["__1_0.distcp is missing"]
    (iteration / "manifest.json").unlink()
    assert [fault.split(" ", 1)[1] for fault in inspect_checkpoint(iteration).faults] == [
        "has no manifest.json: it was not saved to the end",
        "is missing",
    ]
    (iteration / "metadata.json").unlink()
    with pytest.raises(TrinityError, match=r"no metadata\.json"):
        inspect_checkpoint(iteration)


def test_only_checksums_find_a_flipped_bit(iteration: Path) -> None:
    file = iteration / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(content)
    assert inspect_checkpoint(iteration).is_whole
    [fault] = inspect_checkpoint(iteration, checksums=True).faults
    assert fault.startswith("__0_0.distcp has another content")


def test_checkpoints_beside_each_other(tmp_path: Path) -> None:
    args, small = model_args(), {"decoder.final_layernorm.weight": torch.ones(64)}
    for number in (2, 4, 10):
        write_checkpoint(tmp_path, small, args, iteration=number)
    (tmp_path / "iter_0000004" / "__0_0.distcp").write_bytes(b"")
    (tmp_path / "iter_0000011").mkdir()
    (tmp_path / "tokenizer").mkdir()
    found = {one.name: one.fault for one in iterations_of(tmp_path)}
    assert list(found) == ["iter_0000002", "iter_0000004", "iter_0000010", "iter_0000011"]
    assert found["iter_0000002"] is None
    assert str(found["iter_0000004"]).startswith("__0_0.distcp has 0 bytes in place of ")
    assert found["iter_0000010"] is None
    assert found["iter_0000011"] == ".metadata is missing"
    assert list(iterations_of(tmp_path / "absent")) == []


def test_the_command_line(
    run: Path,
    iteration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "found.json"
    words = [run, "--norms", "--diff", iteration, "--json", file]
    assert run_tool(TOOL, words, monkeypatch) == (0, "")
    lines = capsys.readouterr().out.splitlines()
    assert f"checkpoint: path {iteration}" in lines
    assert "in the directory: iter_0000002 whole, by the sizes of its files" in lines
    assert "parameters: router 2,048" in lines
    assert "whole, by sizes of all files and every chunk; training can load it" in lines
    assert "trained: tokens 1,024" in lines
    found = json.loads(file.read_text())
    assert found["whole"] is True
    assert found["tokens"] == 1024
    assert found["parameters"] == inspect_checkpoint(run).parameters
    assert found["diff"]["tensors"] == {}
    expected = model_tensors(dtype=torch.bfloat16)
    assert found["norms"].keys() == expected.keys()
    norm = expected[KEY].double().norm().item()
    assert found["norms"][KEY]["norm"] == pytest.approx(norm, rel=1e-12)
    assert f"norm: {KEY} norm {norm:.6g} largest " in "\n".join(lines)


def test_the_command_line_fails_where_it_is_not_whole(
    run: Path, iteration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (iteration / "__1_0.distcp").unlink()
    expected = f"{iteration} is not whole: __1_0.distcp is missing"
    assert run_tool(TOOL, [run], monkeypatch) == (1, expected)


def test_the_command_line_fails_where_values_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: dict[str, Tensor] = model_tensors(dtype=torch.bfloat16)
    tensors[KEY][7, 95, 63] = torch.inf
    path = write_checkpoint(tmp_path / "broken", tensors, model_args(*FLAGS))
    expected = f"{path} has values that are not finite in 1 tensors, {KEY} the first, so no "
    assert run_tool(TOOL, [path, "--norms"], monkeypatch) == (
        1,
        f"{expected}training goes on from it",
    )


def test_the_command_line_fails_where_two_differ(
    run: Path, iteration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: dict[str, Tensor] = model_tensors(dtype=torch.bfloat16)
    tensors[KEY][7, 95, 63] += 1
    other = write_checkpoint(tmp_path / "other", tensors, model_args(*FLAGS))
    expected = f"{other} differs from {iteration}"
    assert run_tool(TOOL, [run, "--diff", other], monkeypatch) == (1, expected)


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["absent"], 1, "absent holds no checkpoint"),
        (["absent", "--memory-gb", "0"], 2, "--memory-gb 0.0 has to be positive"),
        (["absent", "--json", "absent/file"], 2, "--json: absent is no directory"),
    ],
)
def test_bad_command_lines(
    words: list[str], code: int, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_tool(TOOL, words, monkeypatch)
    assert found[0] == code
    assert named in found[1]


def test_a_hugging_face_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    code, line = run_tool(TOOL, [tmp_path], monkeypatch)
    assert code == 1
    assert f"{tmp_path} is a Hugging Face directory; make a checkpoint" in line
    assert f"tools/import_hf.py --hf {tmp_path}" in line
