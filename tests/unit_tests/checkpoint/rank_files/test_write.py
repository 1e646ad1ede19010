"""Megatron's `torch` format: each rank's file has that rank's part of every tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_trinity.checkpoint.inspect import manifest_faults
from megatron_trinity.checkpoint.layout_args import args_of_layout, parse_layout_text
from megatron_trinity.checkpoint.rank_files.write import file_ranks
from megatron_trinity.checkpoint.reshard import reshard
from megatron_trinity.errors import UsageError
from megatron_trinity.planning.fake_ranks import fake_groups
from tests.checkpoints import model_args, model_tensors, write_checkpoint

LAYERS = "decoder.layers."


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return model_tensors(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def run(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    write_checkpoint(run, tensors, model_args("--bf16"), common={"optimizer": {"step": 2}})
    return run


def rank_file(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path / "model_optim_rng.pt", weights_only=True)
    return loaded


def test_one_rank_has_every_tensor_whole(
    run: Path, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    done = reshard(run, tmp_path / "new", ckpt_format="torch", optimizer=False)
    assert done.files == 1
    assert done.notes == ["load it with --ckpt-format torch --finetune"]
    found = rank_file(done.target / "mp_rank_00")
    assert (found["iteration"], found["checkpoint_version"]) == (2, 3.0)
    assert "optimizer" not in found
    model = found["model"]
    experts = {
        f"{LAYERS}{layer}.mlp.experts.local_experts.{expert}.{name}.weight": tensors[
            f"{LAYERS}{layer}.mlp.experts.experts.{name}.weight"
        ][expert]
        for layer in range(1, 5)
        for expert in range(8)
        for name in ("linear_fc1", "linear_fc2")
    }
    whole = {
        key: tensor
        for key, tensor in tensors.items()
        if not key.startswith("optimizer.") and ".experts.experts." not in key
    }
    padding = torch.zeros(96, 64, dtype=torch.bfloat16)  # of the vocabulary, 160 to 256
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole[key] = torch.cat([whole[key], padding])
    expected = {**whole, **experts}
    held = {key: value for key, value in model.items() if isinstance(value, Tensor)}
    assert held.keys() == expected.keys()
    for key, tensor in expected.items():
        assert held[key].dtype == tensor.dtype, key
        assert torch.equal(held[key], tensor), key


def test_every_rank_has_its_part(run: Path, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    layout = parse_layout_text("tp=2,pp=2,ep=4,etp=1,stages=Et|t|tt|tL")
    done = reshard(run, tmp_path / "new", layout, ckpt_format="torch", optimizer=False)
    assert sorted(path.name for path in done.target.iterdir()) == [
        "manifest.json",
        *(f"mp_rank_{e % 2:02d}_{p:03d}_{e:03d}" for p, e in [(0, 0), (0, 2), (1, 0), (1, 2)]),
        *(f"mp_rank_{e % 2:02d}_{p:03d}_{e:03d}" for p, e in [(0, 1), (0, 3), (1, 1), (1, 3)]),
    ]
    assert list(manifest_faults(done.target, checksums=True)) == []
    found = rank_file(done.target / "mp_rank_01_001_003")
    assert found["args"].tensor_model_parallel_size == 2
    assert found["args"].world_size == 8
    # The second rank has the second and the fourth stage: layer 1, and layer 4 with the LM head.
    second, fourth = found["model0"], found["model1"]
    assert not any("embedding" in key for key in {**second, **fourth})
    source = f"{LAYERS}1.self_attention."
    qkv = tensors[f"{source}linear_qkv.weight"]
    assert torch.equal(second[f"{LAYERS}0.self_attention.linear_qkv.weight"], qkv[96:])
    out = tensors[f"{source}linear_proj.weight"]
    assert torch.equal(second[f"{LAYERS}0.self_attention.linear_proj.weight"], out[:, 32:])
    fc1 = tensors[f"{LAYERS}1.mlp.shared_experts.linear_fc1.weight"]  # gate, then up
    gate_and_up = torch.cat([fc1[24:48], fc1[72:96]])
    assert torch.equal(second[f"{LAYERS}0.mlp.shared_experts.linear_fc1.weight"], gate_and_up)
    for name in ("linear_fc1", "linear_fc2"):
        stack = tensors[f"{LAYERS}1.mlp.experts.experts.{name}.weight"]
        for local in range(2):
            held = second[f"{LAYERS}0.mlp.experts.local_experts.{local}.{name}.weight"]
            assert torch.equal(held, stack[6 + local])
    bias = tensors[f"{LAYERS}1.mlp.router.expert_bias"]
    assert torch.equal(second[f"{LAYERS}0.mlp.router.expert_bias"], bias)
    head = tensors["output_layer.weight"]
    assert torch.equal(fourth["output_layer.weight"][:32], head[128:])
    assert torch.equal(fourth["output_layer.weight"][32:], torch.zeros(96, 64).bfloat16())
    norm = tensors[f"{LAYERS}4.mlp_bda.norm.weight"]
    assert torch.equal(fourth[f"{LAYERS}0.mlp_bda.norm.weight"], norm)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dp=4", [0]),
        ("tp=2,dp=2", [0, 1]),
        ("tp=2,cp=2", [0, 1]),
        ("ep=2,dp=4", [0, 1]),
        ("tp=4,ep=2,etp=1", [0, 1, 2, 3]),
        ("tp=2,ep=2,etp=2", [0, 1, 2, 3]),
        ("tp=2,ep=2,pp=5,dp=4", [8 * stage + rank for stage in range(5) for rank in range(4)]),
    ],
)
def test_a_rank_for_each_file(text: str, expected: list[int]) -> None:
    """By Megatron's own names of files, in the process groups of every rank."""
    from megatron.training.checkpointing import get_checkpoint_name

    args = args_of_layout(model_args(), parse_layout_text(text))
    names: dict[str, int] = {}
    for rank in range(args.world_size):
        with fake_groups(args, rank):
            names.setdefault(get_checkpoint_name("", 1), rank)
    assert file_ranks(args) == sorted(names.values()) == expected


def test_a_layout_that_the_format_cannot_hold(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="etp=2 has to divide tp=1; use --format torch_dist"):
        reshard(
            run, tmp_path / "new", parse_layout_text("etp=2"), ckpt_format="torch", optimizer=False
        )
    assert not (tmp_path / "new").exists()
    assert args_of_layout(model_args(), parse_layout_text("etp=2")).world_size == 2
