"""`--deterministic-mode` on a machine with CUDA: what is set, and what a step may not call."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda_start import jobs
from tests.cuda_start.conftest import Machines
from tests.trainer import training_flags, write_dataset

SET = {
    "NCCL_ALGO": "Ring",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
WORDS = ("--preset", "nano", "--train-iters", "3000", "--deterministic-mode")
MUON = ("--optimizer", "muon")
SHARDED_ADAM = ("--use-distributed-optimizer", "--dataloader-inter-document-masking")

NO_ORDER = {
    # Raise on a GPU when torch is told to be deterministic (`torch.use_deterministic_algorithms`).
    "aten.histc",
    "aten.kthvalue",
    "aten.median.dim",
    "aten.put_",
    "aten.scatter_reduce",
    "aten.adaptive_avg_pool2d",
    "aten.nll_loss2d_forward",
    "aten.ctc_loss",
    "aten.embedding_bag",
    "aten._embedding_bag",
    "aten.replication_pad1d_backward",
    "aten.reflection_pad1d_backward",
    "aten.upsample_linear1d_backward",
    "aten.grid_sampler_2d_backward",
    "aten.max_unpool2d",
}
OF_FLOATS = {"aten.cumsum", "aten.cumprod"}


def test_variables_are_set(machines: Machines) -> None:
    [start] = machines["bare"].run(jobs.parsed, WORDS, {}, world_size=1)
    assert {name: start["environment"][name] for name in SET} == SET
    told = " ".join(f"{name}={value}" for name, value in SET.items())
    assert start["notes"][1] == f"environment: {told}, for --deterministic-mode"


@pytest.mark.parametrize("name", SET)
def test_a_variable_that_says_otherwise_is_refused(machines: Machines, name: str) -> None:
    [told] = machines["bare"].run(jobs.parsed, WORDS, {name: "7"}, world_size=1)
    assert told == (
        f"{name} is '7', and --deterministic-mode needs {SET[name]}: "
        f"unset {name}, or export {name}={SET[name]}"
    )


def test_a_variable_that_does_as_well_is_left(machines: Machines) -> None:
    given = {"NCCL_ALGO": "Ring,CollnetChain", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    [start] = machines["bare"].run(jobs.parsed, WORDS, given, world_size=1)
    assert {name: start["environment"][name] for name in given} == given


@pytest.mark.parametrize(
    "flags",
    [
        ("--optimizer", "muon"),
        ("--use-distributed-optimizer", "--dataloader-inter-document-masking"),
    ],
    ids=lambda flags: flags[-1],
)
def test_a_step_calls_nothing_without_an_order(
    machines: Machines, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    write_dataset(tmp_path / "data")
    words = training_flags(
        tmp_path / "data",
        *("--train-iters", "3", "--bf16"),
        *("--deterministic-mode", "--seq-aux-loss-coeff", "0.01", *flags),
    )
    [(told, seen)] = machines["bare"].run(jobs.operations, words, world_size=1)
    assert told
    assert len(seen) > 50
    assert any(operation.startswith("aten._scaled_dot_product") for operation in seen)
    called = {operation.removesuffix(" of floats") for operation in seen}
    without_order = {f"{name}.default" for name in NO_ORDER} | NO_ORDER
    assert called & without_order == set()
    assert [
        o for o in seen if o.endswith(" of floats") and o.split(".default")[0] in OF_FLOATS
    ] == []
