"""What is wrong with a directory is told in one line, before anything is written."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AfmoeConfig

from megatron_trinity.arguments.presets import load_preset
from megatron_trinity.checkpoint.hf.config import config_json
from megatron_trinity.checkpoint.hf.import_hf import import_hf
from megatron_trinity.checkpoint.hf.mapping import Experts, entries
from megatron_trinity.checkpoint.hf.source import open_hf_directory, read_config
from megatron_trinity.errors import TrinityError
from tests.afmoe import INDEX, random_tensors, write_afmoe
from tests.paths import ROOT
from tests.trinity import afmoe_config

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
BIAS = "model.layers.1.mlp.expert_bias"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    config = afmoe_config()
    return write_afmoe(tmp_path / "hf", config, random_tensors(config, torch.bfloat16), files=2)


def edit_index(hf: Path, edit: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((hf / INDEX).read_text())
    edit(content["weight_map"])
    (hf / INDEX).write_text(json.dumps(content))


def edit_tensors(hf: Path, file: str, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(hf / file)
    edit(tensors)
    save_file(tensors, hf / file)


def edit_config(hf: Path, **values: object) -> None:
    content = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**content, **values}))


def truncated(hf: Path) -> None:
    file = hf / FIRST
    file.write_bytes(file.read_bytes()[:-7])


def no_header(hf: Path) -> None:
    (hf / FIRST).write_bytes(b"\x05\x00")


def missing_file(hf: Path) -> None:
    (hf / SECOND).unlink()


def named_twice(hf: Path) -> None:
    text = (hf / INDEX).read_text()
    entry = f'"{BIAS}": "{FIRST}", '
    (hf / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {' + entry))


def in_two_files(hf: Path) -> None:
    tensors = {**load_file(hf / FIRST), **load_file(hf / SECOND)}
    for file in (FIRST, SECOND):
        edit_tensors(hf, file, lambda part: part.update({BIAS: tensors[BIAS]}))


def extra_in_file(hf: Path) -> None:
    edit_tensors(hf, FIRST, lambda tensors: tensors.update(extra=torch.zeros(1)))


def extra_everywhere(hf: Path) -> None:
    extra_in_file(hf)
    edit_index(hf, lambda weight_map: weight_map.update(extra=FIRST))


def lacking(hf: Path) -> None:
    for file in (FIRST, SECOND):
        edit_tensors(hf, file, lambda tensors: tensors.pop(BIAS, None))
    edit_index(hf, lambda weight_map: weight_map.pop(BIAS))


def lacking_in_file(hf: Path) -> None:
    for file in (FIRST, SECOND):
        edit_tensors(hf, file, lambda tensors: tensors.pop(BIAS, None))


def wrong_shape(hf: Path) -> None:
    for file in (FIRST, SECOND):
        edit_tensors(hf, file, lambda part: BIAS in part and part.update({BIAS: torch.zeros(9)}))


def set_dtype(hf: Path, dtype: torch.dtype) -> None:
    name = "model.layers.3.mlp.experts.2.up_proj.weight"
    for file in (FIRST, SECOND):
        edit_tensors(
            hf, file, lambda part: name in part and part.update({name: part[name].to(dtype)})
        )


def leads_nowhere(hf: Path) -> None:
    (hf / FIRST).unlink()
    (hf / FIRST).symlink_to(hf.parent / "elsewhere")


def tokenizer_leads_nowhere(hf: Path) -> None:
    (hf / "tokenizer.json").symlink_to(hf.parent / "elsewhere")


def pickled(hf: Path) -> None:
    (hf / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated file": (truncated, f"{FIRST} is not whole or no safetensors file: "),
    "no header": (no_header, f"{FIRST} is not whole or no safetensors file: "),
    "missing file": (missing_file, f"{SECOND} is missing"),
    "tensor named twice": (named_twice, f"{INDEX} names {BIAS} twice"),
    "tensor in two files": (in_two_files, f"{BIAS} is in {FIRST} and in {SECOND}"),
    "extra tensor in a file": (extra_in_file, f"{FIRST} has extra, which {INDEX} does not name"),
    "extra tensor": (extra_everywhere, "no rule takes extra"),
    "missing tensor": (lacking, f"{BIAS} is missing, which decoder.layers.1."),
    "tensor missing from its file": (lacking_in_file, f"lacks {BIAS}, which {INDEX} says"),
    "wrong shape": (wrong_shape, f"{BIAS} has the shape [9], and not [8]"),
    "wrong dtype": (
        lambda hf: set_dtype(hf, torch.float64),
        "experts.2.up_proj.weight is of type F64; only BF16, F16, F32 are converted",
    ),
    "mixed dtypes": (
        lambda hf: set_dtype(hf, torch.float32),
        "matrices are to be of one type",
    ),
    "link to nowhere": (leads_nowhere, f"{FIRST} is missing"),
    "tokenizer's link to nowhere": (tokenizer_leads_nowhere, "tokenizer.json is missing"),
    "index out of the directory": (
        lambda hf: edit_index(hf, lambda map_: map_.update({BIAS: "../elsewhere"})),
        "elsewhere leads out of ",
    ),
    "pickle": (pickled, "pytorch_model.bin is a pickle, which can run code when it is read"),
    "another file": (
        lambda hf: save_file({"x": torch.zeros(1)}, hf / "adapter.safetensors"),
        "adapter.safetensors is no part of the model",
    ),
    "no configuration": (lambda hf: (hf / "config.json").unlink(), "config.json is missing"),
    "broken configuration": (
        lambda hf: (hf / "config.json").write_text('{"model_type"'),
        "config.json is not JSON",
    ),
    "another model": (
        lambda hf: edit_config(hf, model_type="llama"),
        "config.json is not of an AfMoE model",
    ),
    "softmax": (
        lambda hf: edit_config(hf, score_func="softmax"),
        "score_func 'softmax'; Trinity models have 'sigmoid'",
    ),
    "scaled RoPE": (
        lambda hf: edit_config(hf, rope_parameters={"rope_type": "linear", "factor": 2.0}),
        "config.json",
    ),
    "other layers": (
        lambda hf: edit_config(hf, layer_types=["full_attention"] * 5),
        "layer_types that do not follow from global_attn_every_n_layers 4",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_and_nothing_is_written(hf: Path, tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(hf)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TrinityError) as refused:
        import_hf(hf, tmp_path / "save")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_whole_directory_is_taken(hf: Path) -> None:
    found = open_hf_directory(hf)
    assert found.dtype == torch.bfloat16
    assert found.config.to_dict() == AfmoeConfig.from_dict(found.config.to_dict()).to_dict()
    assert found.tensors[BIAS].shape == (8,)


def test_a_configuration_with_the_older_keys_alone(tmp_path: Path) -> None:
    config = afmoe_config()
    content = config_json(config, "bfloat16")
    del content["rope_parameters"], content["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = read_config(tmp_path)
    assert found.rope_parameters["rope_theta"] == 10000.0
    assert found.layer_types == config.layer_types


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "tools/import_hf.py", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_ends_with_1_and_one_line(hf: Path, tmp_path: Path) -> None:
    truncated(hf)
    done = command("--hf", str(hf), "--save", str(tmp_path / "save"))
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {hf / FIRST} is not whole")


def large() -> AfmoeConfig:
    flags = {**load_preset("large")["megatron"], **load_preset("large")["trinity"]}
    return AfmoeConfig(
        vocab_size=flags["vocab-size"],
        hidden_size=flags["hidden-size"],
        intermediate_size=flags["ffn-hidden-size"],
        moe_intermediate_size=flags["moe-ffn-hidden-size"],
        num_hidden_layers=flags["num-layers"],
        num_dense_layers=flags["num-dense-layers"],
        num_attention_heads=flags["num-attention-heads"],
        num_key_value_heads=flags["num-query-groups"],
        head_dim=flags["kv-channels"],
        num_experts=flags["num-experts"],
        num_experts_per_tok=flags["moe-router-topk"],
        num_shared_experts=1,
    )


OUTSIDE_EXPERTS = 3 + 60 * (5 + 6) + 6 * 3 + 54 * (1 + 1 + 3)
"""Tensors of Large: of attention and its norms, dense MLPs, router, bias and shared expert."""


@pytest.mark.parametrize(
    ("experts", "count"),
    [("per-expert", OUTSIDE_EXPERTS + 54 * 256 * 3), ("fused", OUTSIDE_EXPERTS + 54 * 2)],
)
def test_every_name_of_large_is_mapped_in_seconds(
    tmp_path: Path, experts: Experts, count: int
) -> None:
    config = large()
    names = [name for entry in entries(config, experts) for name in entry.hf]
    assert len(names) == count
    (tmp_path / "config.json").write_text(json.dumps(config_json(config, "bfloat16")))
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    began = time.process_time()
    found = open_hf_directory(tmp_path, names_suffice=True)
    assert time.process_time() - began < 10
    assert sum(len(entry.hf) for entry in found.table) == count
    del weight_map[names[-1]]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(TrinityError, match=rf"^{names[-1]} is missing"):
        open_hf_directory(tmp_path, names_suffice=True)


def test_a_dry_run_writes_nothing(hf: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = command("--hf", str(hf), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "names and shapes are right: 177 tensors become 69" in done.stdout
    for file in (FIRST, SECOND):
        (hf / file).unlink()
    done = command("--hf", str(hf), "--dry-run")
    assert "names (there are no weights) are right: 177 tensors become 69" in done.stdout
    assert sorted(tmp_path.rglob("*")) == sorted({*before} - {hf / FIRST, hf / SECOND})
