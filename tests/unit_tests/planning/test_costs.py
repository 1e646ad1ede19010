"""What is counted of a step, on operations whose cost is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_trinity.planning.costs.host_syncs import HostSyncs
from megatron_trinity.planning.costs.kept import KeptBytes
from megatron_trinity.planning.costs.operations import (
    OperationCounter,
    mark_on_host,
    on_host,
    one_launch,
)
from megatron_trinity.planning.costs.places import Places
from tests.distributed.pool import RankPools


def launches(step: Any) -> dict[str, int]:
    with OperationCounter(Places("all")) as counter:
        step()
    return {name: number for (_, name), number in counter.launches.items()}


def test_operations_are_launches_but_for_views_and_metadata() -> None:
    x = torch.ones(4, 6)

    def step() -> None:
        y = x.view(6, 4).t()[1:].split(2)[0]
        y.add_(1.0).mul_(2.0)
        torch._foreach_add_([torch.empty(3), torch.empty(3)], 1.0)
        x.detach().to(x.dtype)
        x[4:].mul_(2.0)  # of no element
        torch.promote_types(x.dtype, torch.bfloat16)

    assert launches(step) == {"add_": 1, "mul_": 1, "_foreach_add_": 1}


def test_what_is_one_kernel_there_counts_once() -> None:
    @torch.no_grad()
    def norm(x: Tensor) -> Tensor:
        return x / x.square().mean().sqrt()

    counted = one_launch("norm", norm)
    x = torch.arange(1.0, 4.0)
    assert launches(lambda: counted(x) + 1) == {"norm": 1, "add": 1}
    assert torch.equal(counted(x), norm(x))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Square.apply(x)
        return result


def test_a_part_has_its_operations_of_both_directions() -> None:
    places = Places("outside")
    inner, outer = nn.Sequential(Squares(), nn.Tanh()), nn.Tanh()
    places.watch(inner, "outer")
    places.watch(inner[0], "inner")
    x = torch.ones(3, requires_grad=True)
    with OperationCounter(places) as counter:
        (outer(inner(x)).exp().sum()).backward()
    assert {key: number for key, number in counter.launches.items() if key[0] != "outside"} == {
        ("inner", "mul"): 1 + 2,
        ("outer", "tanh"): 1,
        ("outer", "tanh_backward"): 1,
    }
    outside = [name for part, name in counter.launches if part == "outside"]
    assert set(outside) >= {"tanh", "tanh_backward", "exp", "sum"}


def syncs(step: Any) -> list[tuple[str, int]]:
    with HostSyncs(Places("all")) as counter:
        step()
    assert all("test_costs.py:" in sync.where for sync in counter.found)
    return sorted((sync.what, number) for sync, number in counter.found.items())


X = torch.arange(4.0)
MASK = X > 1
WAITS = {
    "item": lambda: X[0].item(),
    "tolist": lambda: X.tolist(),
    "__bool__": lambda: bool(MASK[0]),
    "__int__": lambda: int(X[1]),
    "__float__": lambda: float(X[1]),
    "cpu": lambda: X.cpu(),
    "nonzero": lambda: torch.nonzero(X),
    "__getitem__": lambda: X[MASK],
    "__setitem__": lambda: X.clone().__setitem__([0, 1], 2.0),
    "repeat_interleave": lambda: torch.repeat_interleave(X, torch.ones_like(X).long()),
    "where": lambda: torch.where(MASK),
    "masked_select": lambda: X.masked_select(MASK),
    "tensor": lambda: torch.tensor([1.0], device=torch.cuda.current_device()),
    "new_tensor": lambda: X.new_tensor(3.0),
    "cuda.synchronize": lambda: torch.cuda.synchronize(),
    "event.synchronize": lambda: torch.cuda.Event().synchronize(),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_is_seen_where_it_is(what: str) -> None:
    assert syncs(WAITS[what]) == [(what, 1)]


DOES_NOT_WAIT = {
    "numbers and slices": lambda: X[1:][0].add(2),
    "an index": lambda: X[torch.argsort(X)],
    "a masked fill": lambda: torch.where(MASK, X, 0.0).masked_fill(MASK, 1.0),
    "a known number": lambda: torch.repeat_interleave(X, 2),
    "what is to be on the host": lambda: torch.tensor([2, 3], device="cpu").tolist(),
    "what is made on the host": lambda: (torch.tensor([2.0]) + torch.zeros(1)).item(),
    "what came to the host": lambda: mark_on_host(X.clone())[1:].view(3).tolist(),
}


@pytest.mark.parametrize("what", DOES_NOT_WAIT)
def test_all_else_does_not_wait(what: str) -> None:
    with OperationCounter(Places("all")):  # which follows what is on the host
        assert syncs(DOES_NOT_WAIT[what]) == []


def test_a_list_of_tensors_is_read_one_by_one() -> None:
    assert syncs(lambda: torch.tensor([X[0], X[1], X[2]])) == [("tensor", 3)]


def test_the_host_is_followed_through_operations_and_forgotten() -> None:
    with OperationCounter(Places("all")) as counter:
        there = mark_on_host(torch.ones(3))
        both = there + 1
        assert on_host(both, both[1:])
        assert not on_host(both + X[:3])
        assert not on_host()
    assert counter.launches == {("all", "ones"): 1, ("all", "add"): 1}


def test_kept_bytes_count_a_storage_once() -> None:
    places = Places("outside")
    weight = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8, requires_grad=True)
    with KeptBytes(places, [weight]) as kept:
        with places.part("part"):
            y = x @ weight  # keeps x
        z = y.tanh()  # keeps its result
        (z.view(-1) * z.view(-1)).sum()
    assert kept.kept == {"part": x.nbytes, "outside": z.nbytes}


def sent(rank: int, world_size: int) -> dict[str, int]:
    with OperationCounter(Places("all")) as counter:
        x = torch.ones(8)
        dist.all_reduce(x)
        dist.broadcast(x[:2], 0)
        dist.all_gather([torch.empty(8) for _ in range(world_size)], x)
        dist.barrier()
    sizes = {kind: size for (_, kind), size in counter.collectives.items()}
    return {**sizes, "calls": counter.calls["all"]}


def test_bytes_that_a_rank_puts_in(ranks: RankPools) -> None:
    expected = {"all_reduce": 32, "broadcast": 8, "all_gather": 32, "calls": 3}
    assert ranks.run(sent, world_size=2) == [expected] * 2


def test_flexible_attention_is_what_it_is_elsewhere_in_three_launches() -> None:
    from megatron_trinity.model.attention import window_attention
    from megatron_trinity.model.flexible_attention import window_mask
    from megatron_trinity.planning.costs.flexible import flexible

    generator = torch.Generator().manual_seed(1)
    query, key, value, cotangent = (
        torch.randn(2, heads, 20, 8, generator=generator) for heads in (4, 2, 2, 4)
    )
    inputs = tuple(tensor.requires_grad_() for tensor in (query, key, value))
    mask = window_mask(2, 20, 20, 6, query.device)
    expected = window_attention(query, key, value, window=6, scale=0.3)
    gradients = torch.autograd.grad(expected, inputs, cotangent)
    with OperationCounter(Places("all")) as counter:
        got = flexible(query, key, value, block_mask=mask, scale=0.3)
        torch.testing.assert_close(torch.autograd.grad(got, inputs, cotangent), gradients)
    torch.testing.assert_close(got, expected)
    found = {name: number for (_, name), number in counter.launches.items() if "flex" in name}
    assert found == {"flex_attention": 1, "flex_attention_backward": 2}
