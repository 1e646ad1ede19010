"""Comparing an export with its checkpoint finds a right one right and a wrong one wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_trinity.errors import UsageError
from tests.afmoe import random_tensors, write_afmoe
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config

UP = "model.layers.2.mlp.shared_experts.up_proj.weight"
GATE = UP.replace("up_proj", "gate_proj")


def compared(
    rank: int, world_size: int, hf: Path, save: Path
) -> tuple[tuple[int, float, float], tuple[int, float, float], str]:
    """Agreement with the export, and with one of which two matrices changed places."""
    from dataclasses import astuple

    from megatron_trinity.checkpoint.hf.import_hf import import_hf
    from megatron_trinity.checkpoint.hf.verify import verify_export

    import_hf(hf, save)
    right = astuple(verify_export(save, hf))
    tensors = load_file(hf / "model.safetensors")
    tensors[UP], tensors[GATE] = tensors[GATE].clone(), tensors[UP].clone()
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError) as refused:
        verify_export(save, hf, ["a prompt"])
    return right, astuple(verify_export(save, hf)), str(refused.value)


def test_a_right_export_agrees_and_a_wrong_one_does_not(ranks: RankPools, tmp_path: Path) -> None:
    config = afmoe_config(vocab_size=150)
    hf = write_afmoe(tmp_path / "hf", config, random_tensors(config, torch.float32))
    [(right, wrong, refused)] = ranks.run(compared, hf, tmp_path / "save", world_size=1)
    assert right[0] == wrong[0] == 32
    assert right[1] <= 1e-5
    assert right[2] == 1.0
    assert wrong[1] > 1e-3
    assert refused == f"{hf} has no tokenizer for --prompt; leave it out"
