"""The first run on a machine with CUDA: start-up, presets, steps, whatever else is installed.

A pool of ranks a machine; see `machine.py`. Kernels are those of the stand-ins, in plain torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_trinity.planning.layouts import RECOMMENDED
from tests.crosses import first
from tests.cuda_start import jobs
from tests.cuda_start.conftest import PACKAGES, Machines
from tests.distributed.pool import RankPools
from tests.steps import recorded, run_recorded
from tests.trainer import training_flags, write_dataset

SAME = 2e-5
PRESETS = ("nano", "tiny", "mini", "large")
MUON = ("--optimizer", "muon")
PORTABLE = ("--transformer-impl", "local")
"""The stand-in of Transformer Engine has kernels and no layers: those have tests of their own."""
SHARDED_ADAM = ("--use-distributed-optimizer", "--dataloader-inter-document-masking")


def numbers(file: Path) -> list[list[float]]:
    return [
        [float.fromhex(value) for value in values.replace(",", " ").split()]
        for _, values in recorded(file)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "data")
    return folder


def flags_of(data: Path, *flags: str) -> list[str]:
    return training_flags(
        data / "data",
        *("--adam-eps", "1e-4", *PORTABLE, *flags),
    )


def parse(machines: Machines, case: str, *words: str, **environment: str) -> Any:
    words = ("--preset", "nano", "--train-iters", "3000", "--micro-batch-size", "1", *words)
    [result] = machines[case].run(jobs.parsed, words, environment, world_size=1)
    return result


def fusions(args: dict[str, Any]) -> list[bool]:
    names = ("apply_rope_fusion", "moe_permute_fusion", "gradient_accumulation_fusion")
    return [args[name] for name in (*names, "bias_swiglu_fusion")]


@pytest.mark.parametrize("preset", first(1, PRESETS))
@pytest.mark.parametrize("case", first(2, PACKAGES))
def test_presets_start(machines: Machines, ranks: RankPools, case: str, preset: str) -> None:
    layouts = [(r.world_size, r.flags) for r in RECOMMENDED if r.preset == preset]
    world_size, flags = (layouts or [(1, ())])[0]
    job = (jobs.built, preset, world_size, (*flags, *PORTABLE))
    held = machines[case].run(*job, world_size=1)
    assert held == ranks.run(*job, world_size=1)
    assert held[0] > 3.5e6


@pytest.mark.parametrize("preset", first(0, ["nano", "mini", "large", "tiny"]))
def test_presets_start_in_fp8(machines: Machines, preset: str) -> None:
    layouts = [(r.world_size, r.flags) for r in RECOMMENDED if r.preset == preset]
    for world_size, flags in layouts or [(1, ())]:
        words = (*("--preset", preset, "--train-iters", "3000"), *flags)
        words = (*words, "--precision", "fp8-blockwise")
        [config] = machines["both"].run(jobs.configured, words, world_size, world_size=1)
        assert config == {
            "bf16": True,
            "fp8": "e4m3",
            "fp8_recipe": "blockwise",
            "fp8_param": False,
            "moe_grouped_gemm": True,
            "transformer_impl": "transformer_engine",
        }


@pytest.mark.parametrize("case", first(2, PACKAGES))
def test_defaults_follow_from_what_is_installed(machines: Machines, case: str) -> None:
    start = parse(machines, case)
    te, apex = case in ("te", "both"), case in ("apex", "both")
    assert fusions(start["args"]) == [te, te, te or apex, True]
    assert start["args"]["distributed_backend"] == "nccl"
    assert start["args"]["transformer_impl"] == ("transformer_engine" if te else "local")
    assert start["args"]["moe_grouped_gemm"] == te
    [line] = start["notes"]
    assert ("Transformer Engine 2.20.2" in line) == te
    assert ("needs Transformer Engine or NVIDIA's Apex" in line) == (not te and not apex)
    assert ("RoPE (needs Transformer Engine)" in line) == (not te)


@pytest.mark.parametrize("optimizer", [MUON, ("--use-distributed-optimizer",)], ids=lambda o: o[-1])
@pytest.mark.parametrize("case", first(2, PACKAGES))
def test_steps_are_those_of_a_cpu(
    machines: Machines,
    ranks: RankPools,
    data: Path,
    tmp_path: Path,
    case: str,
    optimizer: tuple[str, ...],
) -> None:
    words = flags_of(data, "--train-iters", "3", *optimizer)
    [(code, calls)] = machines[case].run(jobs.trained, words, tmp_path / "cuda", world_size=1)
    [other] = ranks.run(run_recorded, words, tmp_path / "cpu", world_size=1)
    assert code == other == 0
    on_cuda, on_cpu = numbers(tmp_path / "cuda"), numbers(tmp_path / "cpu")
    assert len(on_cuda) == 3
    for one, two in zip(on_cuda, on_cpu, strict=True):
        assert one == pytest.approx(two, rel=SAME)
    # What is installed was used, and nothing else.
    expected = {"norm"} if case != "bare" else set()
    if case != "bare" and optimizer != MUON:
        expected |= {"adam"}
    if case in ("te", "both"):
        expected |= {"rope", "permute", "unpermute", "sort", "gemm", "split"}
    if case in ("apex", "both"):
        expected |= {"wgrad"}
    assert set(calls) == expected


@pytest.mark.slow
def test_documents_and_bf16(machines: Machines, data: Path, tmp_path: Path) -> None:
    words = flags_of(data, "--bf16", "--train-iters", "3", *SHARDED_ADAM)
    losses = []
    for case in ("bare", "both"):
        file = tmp_path / case
        [(code, _)] = machines[case].run(jobs.trained, words, file, world_size=1)
        assert code == 0
        losses.append([step[0] for step in numbers(file)])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.parametrize(
    ("case", "optimizer"),
    first(1, [("both", SHARDED_ADAM), ("bare", MUON), ("both", MUON), ("bare", SHARDED_ADAM)]),
)
def test_a_resumed_run_is_the_same(
    machines: Machines,
    data: Path,
    tmp_path: Path,
    case: str,
    optimizer: tuple[str, ...],
) -> None:
    words = flags_of(data, "--train-iters", "4", "--bf16", *optimizer)
    run = str(tmp_path / "run")
    save = ("--save", run, "--load", run, "--save-interval", "2")
    runs: dict[str, list[tuple[str, ...]]] = {
        "whole": [()],
        "parts": [(*save, "--exit-interval", "2"), save],
    }
    for name, parts in runs.items():
        for part in parts:
            machines[case].run(jobs.trained, [*words, *part], tmp_path / name, world_size=1)
    assert len(recorded(tmp_path / "whole")) == 4
    assert recorded(tmp_path / "parts") == recorded(tmp_path / "whole")


TE_WAY = (
    "Transformer Engine is not installed; leave it out, or pip install --no-build-isolation "
    "'transformer-engine[pytorch]==2.20.2'"
)
DEEP_EP_WAY = "DeepEP is not installed; leave it out, or build it from "


@pytest.mark.parametrize(
    ("case", "words", "told"),
    [
        ("bare", "--transformer-impl transformer_engine", TE_WAY),
        (
            "bare",
            "--precision fp8-blockwise",
            TE_WAY.replace("is", "2.3, which fp8-blockwise needs, is", 1),
        ),
        ("bare", "--moe-permute-fusion", TE_WAY),
        ("bare", "--attention-backend flash", TE_WAY),
        ("bare", "--moe-grouped-gemm --tp-comm-overlap", TE_WAY),
        ("bare", "--moe-token-dispatcher-type flex", DEEP_EP_WAY),
        ("both", "--moe-token-dispatcher-type flex --moe-enable-deepep", DEEP_EP_WAY),
        ("both", "--precision fp8-mxfp8", "needs a GPU of compute capability 10.0 or later"),
        ("both", "--precision fp8-mxfp8", "and this one has 9.0; use fp8-blockwise"),
        ("both", "--precision fp8-delayed --transformer-impl local", "the portable layers compute"),
        ("both", "--precision fp8-blockwise --fp16", "are two precisions; give one"),
        ("both", "--precision fp8-blockwise --fp8-margin 0", "are of scales from past steps"),
        (
            "both",
            "--precision fp8-blockwise --moe-ffn-hidden-size 1000",
            "routed experts: --moe-ffn-hidden-size 1000 over the expert tensor parallel size is",
        ),
        (
            "both",
            "--precision fp8-tensorwise --kv-channels 10",
            "keys and values: 2 x --kv-channels 10 x (--num-attention-heads 8 + --num-query-groups",
        ),
        ("both", "--fp8-format hybrid", "--precision sets format and recipe of FP8 together"),
        ("both", "--fp8-recipe delayed --bf16", "--precision sets format and recipe of FP8"),
        ("both", "--fp4-format e2m1", "is not proved; use --precision"),
        ("both", "--fp8-param-gather", "in rows and pieces that others do not take"),
        ("both", "--fp8-param-gather --optimizer adam", "Muon cuts matrices into rows"),
        ("both", "--no-fp8-wgrad --precision fp8-delayed", "would ignore it"),
        ("both", "--moe-router-padding-for-quantization", "what an expert gets is padded with"),
        (
            "both",
            "--use-flash-attn --transformer-impl local",
            "would change nothing with --transformer-impl local",
        ),
        ("bare", "--overlap-moe-expert-parallel-comm", "use --moe-shared-expert-overlap"),
        ("bare", "--cuda-graph-impl local", "replay a layer with the documents of another"),
        ("both", "--optimizer-cuda-graph --optimizer adam", "a CUDA graph would"),
        ("both", "--init-model-with-meta-device", "initial weights are the report's"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    machines: Machines, case: str, words: str, told: str
) -> None:
    refusal = parse(machines, case, *words.split())
    assert isinstance(refusal, str)
    assert words.split()[0] in refusal
    assert told in refusal
    assert "\n" not in refusal


SPLIT = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    "layout", [SPLIT, ("--context-parallel-size", "2")], ids=lambda words: words[0]
)
def test_queues_are_ordered_where_communication_overlaps(
    machines: Machines, layout: tuple[str, ...]
) -> None:
    start = parse(machines, "bare", *layout, WORLD_SIZE="2")
    assert start["environment"][CONNECTIONS] == "1"
    assert f"environment: {CONNECTIONS}=1, for " in start["notes"][1]
    told = parse(machines, "bare", *layout, WORLD_SIZE="2", CUDA_DEVICE_MAX_CONNECTIONS="8")
    assert told.startswith(f"{CONNECTIONS} is '8', and tensor or context parallelism")
    assert told.endswith(f"needs 1: unset {CONNECTIONS}, or export {CONNECTIONS}=1")


def test_queues_are_left_alone_elsewhere(machines: Machines) -> None:
    start = parse(machines, "bare", CUDA_DEVICE_MAX_CONNECTIONS="8")
    assert start["environment"][CONNECTIONS] == "8"
    assert len(start["notes"]) == 1


@pytest.mark.slow
def test_ranks_that_share_a_layer_train(machines: Machines, data: Path, tmp_path: Path) -> None:
    words = flags_of(data, "--train-iters", "3", *SPLIT, *MUON)
    answers = machines["both"].run(jobs.trained, words, tmp_path / "steps", world_size=2)
    assert [code for code, _ in answers] == [0, 0]
    assert len(recorded(tmp_path / "steps")) == 3
