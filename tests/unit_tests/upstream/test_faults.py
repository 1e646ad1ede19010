"""The faults of upstream that stood in the way of exact resume and exact counts."""

from __future__ import annotations

import logging
import subprocess
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_trinity.upstream import adapt_megatron
from megatron_trinity.upstream.quiet import _ABSENT_PACKAGES, install


@pytest.fixture(autouse=True, scope="module")
def _adapted() -> None:
    adapt_megatron()


def _distributed_optimizer(parameter: torch.nn.Parameter) -> Any:
    """A `DistributedOptimizer` of one parameter, without buffers: only its counters are used."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_trinity.upstream.distributed_adam_steps import _keep_own_counter

    optimizer = DistributedOptimizer.__new__(DistributedOptimizer)
    optimizer.optimizer = torch.optim.AdamW([parameter], lr=0.1)
    for group in optimizer.optimizer.param_groups:
        group.update(lr_mult=1.0, wd_mult=1.0, is_expert_parallel=False)
    optimizer.grad_scaler = None
    optimizer.ddp_config = types.SimpleNamespace(use_megatron_fsdp=False)
    optimizer.config = types.SimpleNamespace(
        fp16=False, use_precision_aware_optimizer_no_fp8_or_ds_fp8=False
    )
    optimizer.gbuf_ranges = []
    _keep_own_counter(optimizer)
    return optimizer


def _step(optimizer: Any, parameter: torch.nn.Parameter) -> None:
    parameter.grad = torch.ones_like(parameter)
    optimizer.optimizer.step()


def test_adam_steps_are_zero_before_the_first_step() -> None:
    optimizer = _distributed_optimizer(torch.nn.Parameter(torch.ones(2)))
    group = optimizer.state_dict()["optimizer"]["param_groups"][0]
    assert group["step"] == 0.0
    assert "params" not in group


def test_adam_steps_are_saved_and_loaded_for_each_parameter() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    optimizer = _distributed_optimizer(parameters[0])
    optimizer.optimizer.param_groups[0]["params"].append(parameters[1])
    for _ in range(3):
        parameters[1].grad = torch.ones(3)
        _step(optimizer, parameters[0])
    saved = optimizer.state_dict()
    assert saved["optimizer"]["param_groups"][0]["step"] == 3.0
    optimizer.load_state_dict(saved)
    states = [optimizer.optimizer.state[p] for p in parameters]
    assert states[0]["step"] is not states[1]["step"]
    parameters[1].grad = torch.ones(3)
    _step(optimizer, parameters[0])
    assert [s["step"].item() for s in states] == [4.0, 4.0]
    assert "step" not in optimizer.optimizer.param_groups[0]


def test_states_without_a_counter_leave_the_loaded_one() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = _distributed_optimizer(parameter)
    for _ in range(2):
        _step(optimizer, parameter)
    optimizer.model_param_group_index_map = {parameter: (0, 0)}
    states = {"param": torch.full((2,), 7.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    with torch.no_grad():
        optimizer._set_main_param_and_optimizer_states(parameter, states)
    assert parameter.tolist() == [7.0, 7.0]
    state = optimizer.optimizer.state[parameter]
    assert state["step"].item() == 2.0
    assert state["exp_avg"].tolist() == [1.0, 1.0]


def test_a_rank_without_parameters_counts_steps() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = _distributed_optimizer(parameter)
    optimizer.optimizer.param_groups[0]["params"].clear()
    for _ in range(2):
        optimizer.optimizer.step()
    assert optimizer.state_dict()["optimizer"]["param_groups"][0]["step"] == 2.0


def test_data_loaders_leave_the_global_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.datasets import data_samplers

    args = types.SimpleNamespace(
        dataloader_type="single",
        micro_batch_size=2,
        global_batch_size=2,
        full_validation=False,
        hybrid_context_parallel=False,
        num_workers=0,
        seed=9,
        exit_signal_handler=False,
    )
    monkeypatch.setattr(data_samplers, "get_args", lambda: args)
    monkeypatch.setattr(data_samplers.mpu, "get_data_parallel_rank", lambda: 0)
    monkeypatch.setattr(data_samplers.mpu, "get_data_parallel_world_size", lambda: 1)
    loader = data_samplers.build_pretraining_data_loader(list(range(8)), 2)
    before = torch.get_rng_state()
    assert next(iter(loader)).tolist() == [2, 3]
    assert torch.equal(torch.get_rng_state(), before)
    assert data_samplers.build_pretraining_data_loader(None, 0) is None


def test_dataset_helpers_are_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.datasets import utils

    def run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("make was run")

    monkeypatch.setattr(subprocess, "run", run)
    utils.compile_helpers()


@pytest.fixture
def _filters() -> Iterator[None]:
    logger = logging.getLogger("torch.utils.cpp_extension")
    kept = list(logger.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        install()
        yield
    logger.filters[:] = kept


@pytest.mark.usefixtures("_filters")
def test_only_the_named_messages_are_quiet() -> None:
    with warnings.catch_warnings(record=True) as shown:
        for message in _ABSENT_PACKAGES:
            warnings.warn(message, stacklevel=1)
        warnings.warn("Apex is installed but broken", stacklevel=1)
        warnings.warn("before: Apex is not installed. Falling back to Torch Norm", stacklevel=1)
    assert [str(w.message) for w in shown] == [
        "Apex is installed but broken",
        "before: Apex is not installed. Falling back to Torch Norm",
    ]
    logger = logging.getLogger("torch.utils.cpp_extension")

    def record(text: str) -> logging.LogRecord:
        return logging.LogRecord(logger.name, logging.WARNING, "", 0, text, (), None)

    assert not logger.filter(record("No CUDA runtime is found, using CUDA_HOME='/usr/local'"))
    assert logger.filter(record("a compiler is missing"))
