"""An export in FP8 stands for the same model as one in bf16, to the rounding of e4m3."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AfmoeForCausalLM, FineGrainedFP8Config
from transformers.quantizers import quantizer_finegrained_fp8
from transformers.quantizers.quantizers_utils import should_convert_module

from megatron_trinity.checkpoint.fp8.forms import FormName
from megatron_trinity.checkpoint.fp8.quantize import E4M3, dequantize, quantize
from megatron_trinity.checkpoint.hf.source import open_hf_directory
from megatron_trinity.errors import TrinityError
from tests.afmoe import dequantized, random_tensors, write_afmoe
from tests.distributed.pool import RankPools
from tests.paths import ROOT
from tests.trinity import afmoe_config
from tests.unit_tests.checkpoint.fp8.test_quantize import assert_within_e4m3

# Blocks of query, gate, key and value have rows of several query groups.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 4,
}
LITTLE = {"memory_bytes": 40_000, "shard_bytes": 300_000, "workers": 2}
"""Bands of one block of rows or of a few rows, in many files, by two processes."""


@dataclass(frozen=True)
class Expected:
    """A form, as its readers know it; a block without columns has all those of its matrix."""

    name: FormName
    scale: str
    scale_dtype: torch.dtype
    rows: int
    columns: int | None

    def block(self, matrix: Tensor) -> tuple[int, int]:
        return self.rows, self.columns or matrix.shape[1]


FORMS = [
    Expected("block", "_scale_inv", torch.float32, 128, 128),
    Expected("compressed-tensors", "_scale", torch.bfloat16, 1, None),
]


@pytest.fixture(params=FORMS, ids=lambda form: form.name)
def form(request: pytest.FixtureRequest) -> Expected:
    expected: Expected = request.param
    return expected


def convert(
    rank: int, world_size: int, hf: Path, save: Path, exports: dict[str, dict[str, Any]]
) -> tuple[list[dict[str, float]], str]:
    """Import, and export as often as asked; returns the errors of FP8, or class and message."""
    from megatron_trinity.checkpoint.hf.export_hf import export_hf
    from megatron_trinity.checkpoint.hf.import_hf import import_hf

    if not save.exists():
        import_hf(hf, save, allow_nonfinite=True)
    try:
        done = [export_hf(save, Path(path), **options) for path, options in exports.items()]
    except TrinityError as error:
        return [], f"{type(error).__name__}: {error}"
    return [export.fp8_errors for export in done], ""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp8")


@pytest.fixture(scope="module")
def all_errors(ranks: RankPools, root: Path) -> dict[str, dict[str, float]]:
    """Writes `plain`, and `FORM` and `FORM-little` of each form; returns the errors of each."""
    config = afmoe_config(**SIZES)
    hf = write_afmoe(root / "hf", config, random_tensors(config, torch.bfloat16))
    exports: dict[str, dict[str, Any]] = {str(root / "plain"): {}}
    for form in FORMS:
        exports[str(root / form.name)] = {"fp8": form.name}
        exports[str(root / f"{form.name}-little")] = {"fp8": form.name, **LITTLE}
    # The exports of little memory start processes of their own.
    [((plain, *found), error)] = ranks.run(
        convert, hf, root / "save", exports, world_size=1, timeout=300
    )
    assert error == ""
    assert plain == {}
    for one, little in zip(found[::2], found[1::2], strict=True):
        assert one == pytest.approx(little, rel=1e-12)
    return {form.name: one for form, one in zip(FORMS, found[::2], strict=True)}


@pytest.fixture
def errors(all_errors: dict[str, dict[str, float]], form: Expected) -> dict[str, float]:
    return all_errors[form.name]


def weights(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def is_linear(name: str) -> bool:
    """Of attention, MLPs and experts, by the names of the layers there are."""
    return any(f"{part}_proj.weight" in name for part in ("q", "k", "v", "o", "gate", "up", "down"))


def test_every_form_is_tested_and_offered() -> None:
    names = [form.name for form in FORMS]
    assert names == list(get_args(FormName))
    tool = (ROOT / "tools/export_hf.py").read_text()
    assert f"choices={json.dumps(names)}" in tool


def test_names_types_and_shapes(root: Path, form: Expected, errors: dict[str, float]) -> None:
    plain, fp8 = weights(root / "plain"), weights(root / form.name)
    linears = {name for name in plain if is_linear(name)}
    # A layer has 5 matrices of attention; 3 are of the dense MLP, else of shared and of 4 experts.
    assert len(linears) == 3 * 5 + 3 + 2 * (3 + 4 * 3)
    assert fp8.keys() == plain.keys() | {name + form.scale for name in linears}
    for name in linears:
        rows, columns = plain[name].shape
        assert fp8[name].dtype == E4M3
        assert fp8[name].shape == (rows, columns)
        assert fp8[name + form.scale].dtype == form.scale_dtype
        across = math.ceil(columns / form.columns) if form.columns else 1
        assert fp8[name + form.scale].shape == (math.ceil(rows / form.rows), across)
    assert errors.keys() == linears


def test_each_matrix_is_the_bf16_one_rounded(
    root: Path, form: Expected, errors: dict[str, float]
) -> None:
    plain, fp8 = weights(root / "plain"), weights(root / form.name)
    for name, error in errors.items():
        block = form.block(plain[name])
        values, scales = quantize(plain[name], block, form.scale_dtype)
        assert torch.equal(fp8[name].view(torch.uint8), values.view(torch.uint8)), name
        assert torch.equal(fp8[name + form.scale], scales), name
        found = dequantize(fp8[name], fp8[name + form.scale], block)
        assert_within_e4m3(found, plain[name], scales, block)
        source = plain[name].double()
        expected = ((found.double() - source).norm() / source.norm()).item()
        assert error == pytest.approx(expected, rel=1e-5), name
        assert 0.02 < error < 1 / 17


def test_everything_else_is_as_in_bf16_bit_by_bit(
    root: Path, form: Expected, errors: dict[str, float]
) -> None:
    plain, fp8 = weights(root / "plain"), weights(root / form.name)
    others = plain.keys() - errors.keys()
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < others
    assert {"model.layers.2.mlp.router.gate.weight", "model.layers.2.mlp.expert_bias"} < others
    for name in others:
        assert fp8[name].dtype == plain[name].dtype
        assert torch.equal(fp8[name], plain[name]), name


def test_little_memory_and_several_files_change_nothing(
    root: Path, form: Expected, errors: dict[str, float]
) -> None:
    directory = root / f"{form.name}-little"
    whole, cut = weights(root / form.name), weights(directory)
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), cut[name].view(torch.uint8)), name
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in cut.values())
    file_of = index["weight_map"]
    assert len(set(file_of.values())) > 3
    assert all(file_of[name] == file_of[name + form.scale] for name in errors)


KEPT = [
    "model.embed_tokens",
    "lm_head",
    "model.layers.1.mlp.router.gate",
    "model.layers.2.mlp.router.gate",
]


def said_of(directory: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return said


def test_transformers_leaves_the_modules_that_are_not_converted(
    root: Path, all_errors: dict[str, dict[str, float]]
) -> None:
    said = said_of(root / "block")["quantization_config"]
    assert said == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": KEPT,
    }
    assert FineGrainedFP8Config(**said).weight_block_size == [128, 128]
    with torch.device("meta"):
        model = AfmoeForCausalLM(afmoe_config(**SIZES))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            converted = f"{name}.weight" in all_errors["block"]
            assert should_convert_module(name, KEPT) == converted, name
        if name.endswith(".experts"):
            assert should_convert_module(name, KEPT)
    assert "quantization_config" not in said_of(root / "plain")


def test_compressed_tensors_is_told_the_scheme(
    root: Path, all_errors: dict[str, dict[str, float]]
) -> None:
    """The library itself reads it in `tests/clients`."""
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    assert said_of(root / "compressed-tensors")["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**number, "strategy": "channel", "dynamic": False},
                "input_activations": {**number, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": KEPT,
    }


def test_transformers_reads_blocks(
    root: Path,
    all_errors: dict[str, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = dequantized(weights(root / "block"), "_scale_inv")
    write_afmoe(tmp_path / "hf", afmoe_config(**SIZES), tensors)
    # It asks for accelerate, and on a CPU, where it dequantises, uses none of it.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    model, report = AfmoeForCausalLM.from_pretrained(
        root / "block",
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=FineGrainedFP8Config(dequantize=True),
        output_loading_info=True,
    )
    assert not any(report[kind] for kind in report if kind.endswith("keys"))
    expected = AfmoeForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    ids = torch.randint(160, (2, 23), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        pair = [m.eval()(ids).logits for m in (model, expected)]
    # Where weights lie in memory moves sums by rounding.
    torch.testing.assert_close(*pair, rtol=0, atol=2e-6)


def test_import_and_verification_refuse_it(
    root: Path, form: Expected, errors: dict[str, float]
) -> None:
    from megatron_trinity.checkpoint.hf.verify import verify_export

    directory = root / form.name
    with pytest.raises(TrinityError) as refused:
        open_hf_directory(directory)
    assert f"{directory / 'config.json'} has quantization_config" in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(TrinityError) as refused:
        verify_export(root / "save", directory)
    assert str(refused.value) == f"{directory} is quantised; --verify compares weights as they are"


ATTENTION = "model.layers.0.self_attn."


@pytest.mark.parametrize(
    ("overrides", "name", "shape"),
    [
        ({"head_dim": 24}, f"{ATTENTION}q_proj", "192 x 256"),
        ({"num_key_value_heads": 2}, f"{ATTENTION}k_proj", "64 x 256"),
        ({"hidden_size": 192}, f"{ATTENTION}q_proj", "256 x 192"),
        ({"intermediate_size": 96}, "model.layers.0.mlp.gate_proj", "96 x 256"),
        (
            {"moe_intermediate_size": 64, "num_shared_experts": 2},
            "model.layers.1.mlp.experts.0.gate_proj",
            "64 x 256",
        ),
    ],
)
def test_matrices_that_are_not_whole_blocks_are_refused(
    ranks: RankPools, tmp_path: Path, overrides: dict[str, int], name: str, shape: str
) -> None:
    config = afmoe_config(**{**SIZES, **overrides})
    hf = write_afmoe(tmp_path / "hf", config, random_tensors(config, torch.bfloat16))
    exports = {str(tmp_path / "fp8"): {"fp8": "block"}}
    [(_, error)] = ranks.run(convert, hf, tmp_path / "save", exports, world_size=1)
    assert error == (
        f"TrinityError: {name}.weight is {shape}, and FP8 blocks need multiples of 128; export it "
        "with --fp8 compressed-tensors or without --fp8"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "save"]
    exports = {str(tmp_path / "rows"): {"fp8": "compressed-tensors"}}
    [(_, error)] = ranks.run(convert, hf, tmp_path / "save", exports, world_size=1)
    assert error == "", "rows need no blocks"


def test_values_that_are_not_finite_are_refused(
    ranks: RankPools, form: Expected, tmp_path: Path
) -> None:
    config = afmoe_config(**SIZES)
    tensors = random_tensors(config, torch.bfloat16)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][5, 250:252] = torch.tensor([torch.nan, -torch.inf])
    hf = write_afmoe(tmp_path / "hf", config, tensors)
    exports = {str(tmp_path / "fp8"): {"fp8": form.name}}
    [(_, error)] = ranks.run(convert, hf, tmp_path / "save", exports, world_size=1)
    assert error == f"TrinityError: {name} has 2 values that are not finite"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "save"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"experts": "fused"},
            "FP8 is read with three matrices an expert: --experts per-expert",
        ),
        (
            {"allow_nonfinite": True},
            "FP8 has no scale for what is not finite: leave out --allow-nonfinite or --fp8",
        ),
    ],
)
def test_what_does_not_go_with_fp8(
    ranks: RankPools,
    root: Path,
    form: Expected,
    errors: dict[str, float],
    options: dict[str, Any],
    message: str,
) -> None:
    exports = {str(root / "refused"): {"fp8": form.name, **options}}
    [(_, error)] = ranks.run(convert, root / "hf", root / "save", exports, world_size=1)
    assert error == f"UsageError: {message}"
    assert not (root / "refused").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fp8-report", "report.json"], "--fp8-report goes with --fp8"),
        (
            ["--fp8", "block", "--fp8-report", "absent/report.json"],
            "--fp8-report: absent is no directory",
        ),
        (
            ["--fp8", "block", "--verify"],
            "--verify compares weights as they are, not in FP8: leave one out",
        ),
    ],
)
def test_the_command_line_is_checked_first(words: list[str], message: str) -> None:
    command = [sys.executable, "tools/export_hf.py", "--load", "absent", "--hf", "absent/hf"]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")
