"""The pool of ranks itself: results, failures, and that it survives them."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tests.distributed.pool import MAX_THREADS, RankError, RankPools


def rank_and_size(rank: int, world_size: int, offset: int) -> tuple[int, int, int]:
    return rank + offset, world_size, dist.get_rank()


def all_reduced_sum(rank: int, world_size: int) -> torch.Tensor:
    total = torch.full((3,), float(rank + 1))
    dist.all_reduce(total)
    return total


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def leave_threads(rank: int, world_size: int, number: int) -> None:
    if rank == world_size - 1:
        for _ in range(number):
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


def random_number(rank: int, world_size: int) -> float:
    return torch.rand(()).item()


def tensor_parallel_size_of_a_fresh_start(rank: int, world_size: int, size: int) -> int:
    # Asserts by itself that nothing was initialized before.
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    return parallel_state.get_tensor_model_parallel_world_size()


def raise_on_rank(rank: int, world_size: int, bad_rank: int) -> None:
    if rank == bad_rank:
        print("printed before the failure", flush=True)
        raise ValueError("boom")
    dist.barrier()


def raise_everywhere(rank: int, world_size: int) -> None:
    raise ValueError(f"boom {rank}")


def exit_on_every_rank(rank: int, world_size: int) -> None:
    raise SystemExit(2)


def hang_on_rank(rank: int, world_size: int, bad_rank: int) -> None:
    if rank == bad_rank:
        sleep_in_a_function_with_a_name()


def sleep_in_a_function_with_a_name() -> None:
    time.sleep(600)


def die_on_rank(rank: int, world_size: int, bad_rank: int) -> None:
    if rank == bad_rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def unpicklable(rank: int, world_size: int) -> object:
    return lambda: None


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_results_are_in_rank_order(ranks: RankPools, world_size: int) -> None:
    results = ranks.run(rank_and_size, 10, world_size=world_size)
    assert results == [(rank + 10, world_size, rank) for rank in range(world_size)]


def test_all_reduce(ranks: RankPools) -> None:
    for total in ranks.run(all_reduced_sum, world_size=4):
        torch.testing.assert_close(total, torch.full((3,), 10.0))


def test_the_same_processes_serve_every_call(ranks: RankPools) -> None:
    first = ranks.run(process_id, world_size=4)
    assert len(set(first)) == 4
    assert ranks.run(process_id, world_size=4) == first


@pytest.mark.parametrize(("number", "renewed"), [(MAX_THREADS // 3, False), (MAX_THREADS, True)])
def test_ranks_that_keep_too_many_threads_are_renewed(
    ranks: RankPools, number: int, renewed: bool
) -> None:
    ranks.pool(2).close()  # a pool of its own, without threads of earlier calls
    first = ranks.run(process_id, world_size=2)
    ranks.run(leave_threads, number, world_size=2)
    assert (set(ranks.run(process_id, world_size=2)) != set(first)) == renewed


def test_a_call_leaves_no_state_to_the_next(ranks: RankPools) -> None:
    assert ranks.run(tensor_parallel_size_of_a_fresh_start, 2, world_size=4) == [2] * 4
    assert ranks.run(tensor_parallel_size_of_a_fresh_start, 4, world_size=4) == [4] * 4


def test_random_numbers_are_the_same_in_every_call_and_rank(ranks: RankPools) -> None:
    first = ranks.run(random_number, world_size=2)
    assert first[0] == first[1]
    assert ranks.run(random_number, world_size=2) == first


def test_an_exception_names_the_rank(ranks: RankPools) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(raise_on_rank, 1, world_size=2)
    assert list(caught.value.failures) == [1]
    text = str(caught.value)
    assert "1 of 2 ranks failed: 1" in text
    assert "ValueError: boom" in text
    assert "in raise_on_rank" in text
    assert "printed before the failure" in text
    assert ranks.run(rank_and_size, 0, world_size=2) == [(0, 2, 0), (1, 2, 1)]


def test_an_exception_on_every_rank_keeps_the_pool(ranks: RankPools) -> None:
    before = ranks.run(process_id, world_size=2)
    with pytest.raises(RankError) as caught:
        ranks.run(raise_everywhere, world_size=2)
    assert list(caught.value.failures) == [0, 1]
    assert "boom 1" in caught.value.failures[1]
    assert ranks.run(process_id, world_size=2) == before


def test_an_exit_is_a_failure(ranks: RankPools) -> None:
    with pytest.raises(RankError, match="SystemExit: 2"):
        ranks.run(exit_on_every_rank, world_size=2)


def test_a_result_that_cannot_be_sent_is_a_failure(ranks: RankPools) -> None:
    with pytest.raises(RankError, match="pickle"):
        ranks.run(unpicklable, world_size=1)


def test_a_hung_rank_times_out_and_the_pool_recovers(ranks: RankPools) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(hang_on_rank, 1, world_size=2, timeout=1.0)
    assert list(caught.value.failures) == [1]
    text = caught.value.failures[1]
    assert "no answer within 1 s" in text
    assert "sleep_in_a_function_with_a_name" in text
    assert ranks.run(rank_and_size, 0, world_size=2) == [(0, 2, 0), (1, 2, 1)]


def test_a_killed_rank_is_reported_and_the_pool_recovers(ranks: RankPools) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(die_on_rank, 1, world_size=2)
    assert "the process ended by SIGKILL" in caught.value.failures[1]
    assert ranks.run(rank_and_size, 0, world_size=2) == [(0, 2, 0), (1, 2, 1)]


def test_a_rank_killed_between_calls_is_replaced(ranks: RankPools) -> None:
    victim = ranks.run(process_id, world_size=2)[0]
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while ranks.pool(2).pids[0] == victim and time.monotonic() < deadline:
        time.sleep(0.01)
    assert victim not in ranks.run(process_id, world_size=2)
