"""What other libraries do with an export, and that what they save comes back as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AfmoeForCausalLM, AutoTokenizer

from tests.clients.exports import TEXT, client
from tests.distributed.pool import RankPools

pytestmark = [pytest.mark.clients, pytest.mark.slow]

LORA_RANK = 2


def returned(
    rank: int, world_size: int, hf: Path, save: Path, back: Path
) -> tuple[int, float, float]:
    """Agreement of a directory with the checkpoint that it becomes; it is exported again too."""
    from megatron_trinity.checkpoint.hf.export_hf import export_hf
    from megatron_trinity.checkpoint.hf.import_hf import import_hf
    from megatron_trinity.checkpoint.hf.verify import verify_export

    import_hf(hf, save)
    export_hf(save, back)
    return astuple(verify_export(save, hf))


def come_back(ranks: RankPools, hf: Path, work: Path) -> dict[str, Tensor]:
    """Import a directory, compare the models, and give what another export of it holds."""
    arguments = (hf, work / "save", work / "back")
    [(tokens, difference, same)] = ranks.run(returned, *arguments, world_size=1)
    assert tokens > 10
    assert difference < 1e-4
    assert same == 1.0
    assert (work / "back/tokenizer.json").is_file()
    return weights(work / "back")


def weights(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_saved_again_by_transformers(
    clients_python: Path, ranks: RankPools, exports: Path, tmp_path: Path, dtype: str
) -> None:
    client(clients_python, tmp_path, "resave.py", exports / dtype, tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    back, exported = come_back(ranks, tmp_path / "hf", tmp_path), weights(exports / dtype)
    for name, tensor in exported.items():
        if dtype == "bf16" and "norm" in name:  # it loads all but the expert bias in bf16
            exported[name] = tensor.bfloat16().float()
    assert different(back, exported) == set()
    assert {name: t.dtype for name, t in back.items()} == {n: t.dtype for n, t in exported.items()}


def fine_tuned(python: Path, exports: Path, work: Path, mode: str) -> Sequence[float]:
    """Losses of the steps, of which the first is that of the export."""
    printed = client(python, work, "finetune.py", exports / "fp32", work / "hf", mode)
    losses: list[float] = json.loads(printed.strip().splitlines()[-1])
    ids = AutoTokenizer.from_pretrained(exports / "fp32")(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        first = AfmoeForCausalLM.from_pretrained(exports / "fp32")(ids, labels=ids).loss
    assert losses[0] == pytest.approx(first.item(), rel=1e-4)
    assert losses[-1] < losses[0] - 0.5
    return losses


def test_steps_of_trainer(
    clients_python: Path, ranks: RankPools, exports: Path, tmp_path: Path
) -> None:
    fine_tuned(clients_python, exports, tmp_path, "full")
    back, before = come_back(ranks, tmp_path / "hf", tmp_path), weights(exports / "fp32")
    same = back.keys() - different(back, before)
    # Trainer leaves the expert bias, and experts that no token went to.
    assert {name for name in same if ".experts." not in name} == {
        name for name in back if name.endswith("expert_bias")
    }
    assert any(".experts." in name for name in back.keys() - same)


def test_lora_with_peft(
    clients_python: Path, ranks: RankPools, exports: Path, tmp_path: Path
) -> None:
    fine_tuned(clients_python, exports, tmp_path, "lora")
    back, before = come_back(ranks, tmp_path / "hf", tmp_path), weights(exports / "fp32")
    changed = different(back, before)
    targets = tuple(f"self_attn.{letter}_proj.weight" for letter in "qkvo")
    assert changed == {name for name in back if name.endswith(targets)}
    for name in changed:
        values = torch.linalg.svdvals(back[name].double() - before[name].double())
        assert values[LORA_RANK] < 1e-5 * values[0], name
