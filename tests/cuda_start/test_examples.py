"""The commands of `examples/trinity_*` start on a machine that has what they name."""

from __future__ import annotations

import os
import shlex
import subprocess
from typing import Any

import pytest

from tests.crosses import first
from tests.cuda_start import jobs
from tests.cuda_start.conftest import Machines
from tests.paths import ROOT

RANKS = {"nano": 8, "mini": 8, "large": 512}
SCRIPT = "03_pretrain_node.sh"


def command_of(preset: str, *words: str, **environment: str) -> list[str]:
    """What the script of a preset would run."""
    script = ROOT / f"examples/trinity_{preset}" / SCRIPT
    given = {"DRY_RUN": "1", "NODE_RANK": "3", "MASTER_ADDR": "first", **environment}
    answer = subprocess.run(
        ["bash", script, *words],
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(answer.stdout)


def parsed(machines: Machines, case: str, preset: str, *more: str) -> Any:
    words = command_of(preset)
    words = words[words.index("pretrain_trinity.py") + 1 :]
    environment = {"WORLD_SIZE": str(RANKS[preset])}
    [found] = machines[case].run(jobs.parsed, (*words, *more), environment, world_size=1)
    return found


@pytest.mark.parametrize("preset", first(0, ("large", "nano", "mini")))
def test_it_starts_where_all_is_installed(machines: Machines, preset: str) -> None:
    start = parsed(machines, "all", preset)
    assert isinstance(start, dict), start
    args = start["args"]
    assert args["preset"] == preset
    expected = {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "deepep",
        "moe_permute_fusion": True,
        "moe_shared_expert_overlap": True,
        "gradient_accumulation_fusion": True,
        "transformer_impl": "transformer_engine",
        "expert_model_parallel_size": 8,
        "use_layer_wise_distributed_optimizer": True,  # what Muon makes of the flag
        "world_size": RANKS[preset],
        "bf16": True,
    }
    assert {name: args[name] for name in expected} == expected
    assert args["pipeline_model_parallel_size"] == (8 if preset == "large" else 1)
    assert (args["recompute_granularity"] == "full") == (preset != "nano")


@pytest.mark.slow
@pytest.mark.parametrize("preset", RANKS)
def test_it_is_refused_by_name_without_deep_ep(machines: Machines, preset: str) -> None:
    told = parsed(machines, "both", preset)
    assert isinstance(told, str)
    assert told.startswith("--moe-token-dispatcher-type: DeepEP is not installed; leave it out")


@pytest.mark.slow
def test_cuda_graphs_stay_refused(machines: Machines) -> None:
    told = parsed(machines, "all", "nano", "--cuda-graph-impl", "local")
    assert "--cuda-graph-impl" in told
    assert "replay a layer with the documents of another" in told


@pytest.mark.slow
def test_its_model_is_that_of_the_usual_dispatcher(machines: Machines) -> None:
    """The dispatcher of DeepEP is made as megatron-core makes it."""
    plain = ("--expert-model-parallel-size", "8", "--transformer-impl", "local")
    exchange = ("--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "deepep")
    held = [
        machines["all"].run(jobs.built, "nano", 8, (*plain, *more), world_size=1)
        for more in ((), (*exchange, "--moe-permute-fusion", "--moe-shared-expert-overlap"))
    ]
    assert held[0] == held[1] != [0]


def test_flags_behind_the_command_come_last() -> None:
    words = command_of("nano", "--lr", "1e-4", DATA="some data/x")
    assert words[-2:] == ["--lr", "1e-4"]
    assert "--standalone" in words[words.index("torchrun") : words.index("pretrain_trinity.py")]
    assert words[words.index("--nproc-per-node") + 1] == "8"
    assert words[words.index("--train-data-path") + 1] == "some data/x_train"
    large = command_of("large")
    assert large[large.index("--node-rank") + 1] == "3"
    assert large[large.index("--master-addr") + 1] == "first"
    assert "Et*4|(t*4|)*13t*3|tL" in large


def test_layouts_are_the_recommended_ones() -> None:
    from megatron_trinity.planning.layouts import recommended

    for preset, ranks in (("nano", 16), ("mini", 64), ("large", 512)):
        words = " ".join(command_of(preset))
        flags = list(recommended(preset, ranks).flags)
        assert all(word in words for word in flags), preset
