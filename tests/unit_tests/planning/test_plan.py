"""The planner: machines, cuts of a pipeline, the search, and its command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_trinity.errors import UsageError
from megatron_trinity.planning.candidates import candidates, pipeline, without
from megatron_trinity.planning.fake_ranks import parse_layout
from megatron_trinity.planning.flops import forward_parts, pairs_of_layers, stage_flops
from megatron_trinity.planning.gpu_arguments import parse_for_gpus
from megatron_trinity.planning.lines import measured_line, short
from megatron_trinity.planning.machines import machine, machines
from megatron_trinity.planning.plan import Goal, make_plan
from megatron_trinity.planning.search import search
from megatron_trinity.planning.state import StateBytes
from tests.paths import ROOT
from tests.unit_tests.planning.presets import PRESETS


def test_machines() -> None:
    found = machines()
    assert set(found) == {"h100", "h200", "b200", "b300"}
    for one in found.values():
        assert one.fp8 == pytest.approx(2 * one.bf16, rel=1e-3)
        assert one.network < one.nvlink < one.bandwidth
        assert "data sheet" in one.source
    with pytest.raises(UsageError, match="--gpu a100: not known; there are h100"):
        machine("a100")


@pytest.mark.parametrize("name", PRESETS)
def test_parts_are_the_whole(name: str) -> None:
    sizes, length = PRESETS[name].sizes, PRESETS[name].seq_length
    batch = (length, *pairs_of_layers(sizes, [length]))
    parts = forward_parts(sizes, sizes.layer_kinds(), True, *batch)
    assert sum(parts.values()) == stage_flops(sizes, sizes.layer_kinds(), True, *batch)
    assert all(parts.values())


def test_pipeline_is_balanced() -> None:
    args = parse_layout("large", 512, ())
    assert pipeline(args, 16) == "Et*3|" + "t*4|" * 14 + "tL"
    for number in (2, 3, 8, 24, 32):
        words = pipeline(args, number).split("|")
        assert len(words) == number
        layers = [sum(int(part or 1) for part in count(word)) for word in words]
        assert sum(layers) == 60


def count(word: str) -> list[str]:
    """Numbers behind each `t`, empty for one."""
    return re.findall(r"t(?:\*(\d+))?", word)


def test_flags_that_are_given_are_left_alone() -> None:
    words = ["--a", "1", "--b", "--c", "x", "y", "--d"]
    assert without(words, ["--a", "7", "--c"]) == ["--b", "--d"]


def test_candidates_keep_what_is_given() -> None:
    flags = ("--expert-model-parallel-size", "4")
    args = parse_layout("nano", 64, flags)
    found = list(candidates(args, flags, 8))
    assert {c.ep for c in found} == {4}
    assert {c.tp for c in found} == {1, 2, 4, 8}
    for c in found:
        assert 64 % (c.tp * c.pp * c.cp) == 0


GOAL = Goal("mini", 64, machine("h100"), 8, ("--expert-model-parallel-size", "8"))
FEW = ("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1")


def test_the_best_fits_and_is_accepted() -> None:
    goal = replace(GOAL, flags=(*GOAL.flags, *FEW))
    found = search(goal, 3)
    assert found.plans
    assert all(plan.fits and plan.is_exact for plan in found.plans)
    steps = [plan.time.step for plan in found.plans]
    assert steps == sorted(steps)
    for plan in found.plans:
        parse_layout("mini", 64, plan.flags)  # which the trainer does
        assert 0 < plan.time.mfu < 1
        assert plan.fullest.peak <= goal.room


@pytest.mark.slow
def test_what_would_make_it_fit() -> None:
    goal = replace(GOAL, machine=replace(GOAL.machine, memory=35e9))
    found = search(replace(goal, flags=(*goal.flags, *FEW)))
    assert not found.plans
    assert found.closest is not None
    assert found.ways[0].startswith("--grad-reduce-in-bf16: ")
    assert any(way.startswith("--gpu h100: ") for way in found.ways)


def test_recompute_takes_memory_off_and_adds_time() -> None:
    none = make_plan(GOAL, ("--use-distributed-optimizer", *GOAL.flags))
    full = (*("--recompute-granularity", "full"), *("--recompute-method", "uniform"))
    again = make_plan(GOAL, (*none.flags, *full, "--recompute-num-layers", "1"))
    assert again.fullest.peak < none.fullest.peak
    assert again.time.step > none.time.step
    assert again.time.model_flops == none.time.model_flops


def test_fp8_is_planned_without_a_gpu() -> None:
    flags = ("--use-distributed-optimizer", *GOAL.flags)
    bf16 = make_plan(GOAL, flags)
    fp8 = make_plan(GOAL, (*flags, "--precision", "fp8-blockwise"))
    assert fp8.kernels.fp8
    assert fp8.fullest.copies > 0
    assert fp8.time.products < bf16.time.products
    words = ("--precision", "fp8-blockwise")
    with pytest.raises(UsageError, match="portable layers"):
        parse_for_gpus("mini", 64, (*words, "--transformer-impl", "local"))
    with pytest.raises(UsageError, match="--ffn-hidden-size 6152"):
        parse_for_gpus("mini", 64, (*words, "--ffn-hidden-size", "6152"))


def test_lines() -> None:
    planned, measured = StateBytes(100, 200, 3000, 0), StateBytes(100, 220, 3000, 0)
    assert measured_line(planned, measured, (2 * 10**9, 3 * 10**9)) == (
        "> plan and measured, rank 0: weights 100 B as planned, gradients 200 B planned, 220 B "
        "measured (+10.0%), optimizer 3 kB as planned, peak 2 GB planned, 3 GB measured (+50.0%)"
    )
    assert short(398.6e9) == "399 G"


def plan(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tools/plan.py", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    words = ("--preset", "nano", "--gpus", "16", "--gpu", "h100", *FEW, "--train-tokens", "1T")
    done = plan(*words, "--layouts", "1", "--what-if", "micro-batch-size=2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "pretrain_trinity.py --preset nano" in done.stdout
    assert "assumed, none of it measured: " in done.stdout
    assert "what if micro-batch-size=2: peak GB as planned " in done.stdout
    best, other = json.loads(file.read_text())
    assert best["fits"]
    assert best["run"]["tokens"] == pytest.approx(1e12, rel=0.01)
    stage = best["stages"][0]
    parts = ("weights", "gradients", "optimizer", "copies", "working")
    assert stage["peak"] == sum(stage[part] for part in parts) + sum(stage["kept"].values())
    assert other["what_if"] == "micro-batch-size=2"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpu", "a100"), "--gpu a100: not known"),
        (("--gpu", "h100", "--nonsense"), "--nonsense"),
        (("--gpu", "h100", "--layouts", "0"), "--layouts 0: use 1 or more"),
    ],
)
@pytest.mark.slow
def test_wrong_usage_is_told_in_one_line(words: tuple[str, ...], says: str) -> None:
    done = plan("--preset", "tiny", "--gpus", "4", *words)
    assert done.returncode == 2
    [error] = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert says in error
