"""The CPU stand-ins: where tensors land, and what the log says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megatron_trinity.upstream import adapt_megatron


@pytest.fixture(autouse=True, scope="module")
def _adapted() -> None:
    adapt_megatron()


@pytest.fixture(autouse=True)
def _random_state() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_availability_stays_honest() -> None:
    assert torch.cuda.is_available() is False
    assert torch.cuda.device_count() >= 1
    assert str(torch.cuda.current_device()) == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 0)])
def test_cuda_devices_become_the_cpu(device: Any) -> None:
    base = torch.ones(2)
    for tensor in (
        torch.zeros(2, device=device),
        torch.tensor([1.0], device=device),
        torch.empty_like(base, device=device),
        base.new_zeros(2, device=device),
        base.to(device),
        base.to(device=device),
        base.to(device, torch.bfloat16),
        base.cuda(),
        base.cuda(0),
    ):
        assert tensor.device.type == "cpu"
    assert base.to(device, torch.bfloat16).dtype == torch.bfloat16
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
    assert torch.empty(1, pin_memory=True).is_pinned() is False
    assert base.pin_memory() is base


def test_other_devices_are_left_alone() -> None:
    assert torch.zeros(2, device="meta").is_meta
    assert torch.zeros(2).to("meta").is_meta
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta


def test_placement_holds_in_other_threads() -> None:
    devices: list[str] = []
    thread = threading.Thread(
        target=lambda: devices.append(torch.zeros(1, device="cuda").device.type)
    )
    thread.start()
    thread.join()
    assert devices == ["cpu"]


def test_tensor_type_names_compare_equal_to_both_spellings() -> None:
    name = torch.ones(1).type()
    assert name == "torch.FloatTensor"
    assert name == "torch.cuda.FloatTensor"
    assert name != "torch.cuda.HalfTensor"
    assert torch.ones(1).bfloat16().type() in ["torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]
    assert torch.ones(1, device="meta").bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert {name: 1}["torch.FloatTensor"] == 1
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_streams_and_events_do_nothing_and_measure() -> None:
    stream, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), None
    with torch.cuda.stream(stream):
        start.record()
        end = torch.cuda.current_stream().record_event()
    stream.wait_stream(torch.cuda.current_stream())
    assert start.elapsed_time(end) >= 0.0
    torch.cuda.synchronize()


def test_memory_is_that_of_the_process() -> None:
    before = torch.cuda.memory_allocated()
    block = torch.ones(16 << 20)  # 64 MiB, written to
    grown = torch.cuda.memory_allocated() - before
    assert 48 << 20 < grown < 256 << 20
    assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated() - (1 << 20)
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] >= block.numel() * 4
    total = torch.cuda.get_device_properties(0).total_memory
    assert torch.cuda.mem_get_info()[1] == total > torch.cuda.memory_allocated()


def _tracker() -> Any:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 11)
    tracker.add("b", 12)
    return tracker


def test_forked_states_draw_what_their_seed_says_and_give_the_outer_state_back() -> None:
    tracker = _tracker()
    expected = torch.rand(4, generator=torch.Generator().manual_seed(11))
    torch.manual_seed(5)
    outer = torch.rand(4, generator=torch.Generator().manual_seed(5))
    with tracker.fork("a"):
        first = torch.rand(2)
    got_outer = torch.rand(4)
    with tracker.fork("a"):
        second = torch.rand(2)
    assert torch.equal(torch.cat([first, second]), expected)
    assert torch.equal(got_outer, outer)


def test_forks_nest_and_saved_states_resume() -> None:
    tracker = _tracker()
    with tracker.fork("a"):
        head = torch.rand(1)
        with tracker.fork("b"):
            inner = torch.rand(1)
        tail = torch.rand(1)
    assert torch.equal(
        torch.cat([head, tail]), torch.rand(2, generator=torch.Generator().manual_seed(11))
    )
    assert torch.equal(inner, torch.rand(1, generator=torch.Generator().manual_seed(12)))
    saved = {k: v.clone() for k, v in tracker.get_states().items()}
    with tracker.fork("b"):
        expected = torch.rand(3)
    tracker.set_states(saved)
    with tracker.fork("b"):
        assert torch.equal(torch.rand(3), expected)


def test_fork_gives_the_state_back_after_an_error() -> None:
    tracker = _tracker()
    before = torch.get_rng_state()

    def fail() -> None:
        with tracker.fork("a"):
            torch.rand(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_manual_seed_tracks_three_states_of_their_own_seeds() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random.model_parallel_cuda_manual_seed(
        100, tp_rank=1, ep_rank=2, etp_rank=3, force_reset_rng=True
    )
    states = megatron_random.get_cuda_rng_tracker().get_states()
    seeds = {
        "data-parallel-rng": 100,
        "model-parallel-rng": 100 + 2718 + 1,
        "expert-parallel-rng": 100 + 1024 + 200 + 3,
    }
    assert set(states) == set(seeds)
    for name, seed in seeds.items():
        assert torch.equal(states[name], torch.Generator().manual_seed(seed).get_state())
    assert torch.cuda.get_rng_state().equal(torch.get_rng_state())


def test_recompute_draws_the_same_dropout() -> None:
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(3, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)

    def dropped(x: torch.Tensor) -> torch.Tensor:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(x, 0.5)

    x = torch.ones(64, requires_grad=True)
    out = tensor_parallel.checkpoint(dropped, False, x)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())
    assert 0 < int((out == 0).sum()) < 64


def test_split_sizes_become_numbers() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    sizes = torch.tensor([3, 5])
    for module in (moe_utils, token_dispatcher):
        moved = module.maybe_move_tensor_to_cpu(sizes, as_numpy=True)
        assert isinstance(moved, np.ndarray)
        assert moved.tolist() == [3, 5]
        assert module.maybe_move_tensor_to_cpu(sizes) is sizes
        assert module.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def test_no_function_of_megatron_is_compiled() -> None:
    from megatron.core import jit
    from megatron.core.fusions import fused_bias_swiglu

    assert jit.jit_fuser is jit.noop_decorator
    assert not hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable")


def test_start_does_not_need_cuda() -> None:
    import inspect

    from megatron.training.initialize import initialize_megatron

    parameters = inspect.signature(initialize_megatron).parameters
    assert parameters["allow_no_cuda"].default is True
    assert parameters["skip_random_seed"].default is False
