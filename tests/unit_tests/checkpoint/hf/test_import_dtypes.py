"""Weights of another type than the run's: exact where they can be, counted where they cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AfmoeForCausalLM

from megatron_trinity.errors import TrinityError
from tests.afmoe import random_tensors, write_afmoe
from tests.distributed.pool import RankPools
from tests.paths import ROOT
from tests.trinity import afmoe_config
from tests.unit_tests.checkpoint.hf.test_import_hf import converted, same_bits, weights

NAME = "model.layers.3.mlp.experts.2.up_proj.weight"


def in_fp16() -> dict[str, Tensor]:
    """As a model that was cast as a whole: vectors too, among them values that underflow fp16."""
    tensors = {n: t.half() for n, t in random_tensors(afmoe_config(), torch.float32).items()}
    tensors[NAME].view(-1)[:3] = torch.tensor([65504.0, 2.0**-24, -(2.0**-15) * 1.0009765625])
    return tensors


def counts(rank: int, world_size: int, hf: Path, save: Path, options: dict[str, Any]) -> Any:
    from megatron_trinity.checkpoint.hf.import_hf import import_hf

    try:
        done = import_hf(hf, save, **options)
    except TrinityError as error:
        return str(error)
    return done.source, done.matrices, *map(dict, (done.nonfinite, done.overflowed, done.rounded))


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_fp16_becomes_fp32_bit_by_bit(ranks: RankPools, tmp_path: Path, dtype: str | None) -> None:
    tensors = in_fp16()
    hf = write_afmoe(tmp_path / "hf", afmoe_config(), tensors, files=2)
    converted(ranks, hf, tmp_path / "save", tmp_path / "back", dtype=dtype)
    found = weights(tmp_path / "back")
    assert same_bits(found, {name: tensor.float() for name, tensor in tensors.items()})
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs, ours = (
            AfmoeForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
            for path in (hf, tmp_path / "back")
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_what_bf16_rounds_of_fp16_is_counted(ranks: RankPools, tmp_path: Path) -> None:
    tensors = in_fp16()
    hf = write_afmoe(tmp_path / "hf", afmoe_config(), tensors)
    options = {"dtype": "bf16", "memory_bytes": 40_000}
    [found] = ranks.run(counts, hf, tmp_path / "save", options, world_size=1)
    changed = {n: int((t.bfloat16().float() != t.float()).sum()) for n, t in tensors.items()}
    rounded = {name: count for name, count in changed.items() if tensors[name].ndim > 1 and count}
    assert len(rounded) > 100
    assert found == (torch.float16, torch.bfloat16, {}, {}, rounded)


def test_what_overflowed_is_told_from_what_was_infinite(ranks: RankPools, tmp_path: Path) -> None:
    tensors = random_tensors(afmoe_config(), torch.float32)
    largest = torch.finfo(torch.float32).max  # rounds up to 2^128, which bf16 has not
    tensors[NAME].view(-1)[:3] = torch.tensor([torch.inf, -largest, largest])
    hf = write_afmoe(tmp_path / "hf", afmoe_config(), tensors)
    options: dict[str, Any] = {"dtype": "bf16"}
    [refused] = ranks.run(counts, hf, tmp_path / "save", options, world_size=1)
    assert refused == (
        f"{NAME} has 3 values that are not finite, 2 of them too large for the type; "
        "take --dtype fp32"
    )
    options["allow_nonfinite"] = True
    [found] = ranks.run(counts, hf, tmp_path / "save", options, world_size=1)
    assert found[2:4] == ({NAME: 3}, {NAME: 2})
    changed = (tensors[NAME].bfloat16().float() != tensors[NAME]).sum() - 2
    assert found[4][NAME] == changed


def test_an_infinity_of_fp16_is_refused_as_any_other(ranks: RankPools, tmp_path: Path) -> None:
    tensors = in_fp16()
    tensors[NAME][1, 1] = torch.inf
    hf = write_afmoe(tmp_path / "hf", afmoe_config(), tensors)
    [refused] = ranks.run(counts, hf, tmp_path / "save", {}, world_size=1)
    assert refused == f"{NAME} has 1 values that are not finite"


@pytest.mark.slow
def test_the_command_says_what_converting_changed(tmp_path: Path) -> None:
    tensors = in_fp16()
    hf = write_afmoe(tmp_path / "hf", afmoe_config(), tensors)
    total = sum(
        int((t.bfloat16().float() != t.float()).sum()) for t in tensors.values() if t.ndim > 1
    )
    said = {}
    for dtype in ("fp32", "bf16"):
        done = subprocess.run(
            [
                *(sys.executable, "tools/import_hf.py", "--dtype", dtype),
                *("--hf", str(hf), "--save", str(tmp_path / dtype)),
            ],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said[dtype] = done.stdout.splitlines()[-2]
    assert said["fp32"] == "float16 became float32: every value as it was"
    assert said["bf16"].startswith(f"float16 became bfloat16: {total:,} values rounded in ")
