"""The LM head and the loss in chunks: values against fp64, time and memory beside whole logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.machine import Machine, distance, start
from tests.gpu.rows import Row, at_most, beside, measured

Z_LOSS = 1e-4
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""In bf16 logits are rounded ahead of the softmax, and their gradients once more."""
GIB = 2**30
TARGET = 1.0  # GiB beside weights and gradients


def rows(machine: Machine) -> Iterator[Row]:
    start(machine)
    tokens, hidden, vocab = machine.size((1024, 1024, 20000), (48, 32, 160))
    for dtype, bound in BOUNDS.items():
        for chunk in (tokens, tokens // 4):
            yield from values(machine, dtype, bound, (tokens, hidden, vocab), chunk)
    yield from costs(machine, *machine.size((8192, 1024, 200192), (96, 32, 512)))


def tensors(machine: Machine, sizes: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Hidden states `[s, 1, h]`, the head `[v, h]` and labels `[s, 1]`."""
    tokens, hidden, vocab = sizes
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 1, hidden, generator=generator).to(machine.device, dtype)
    weight = torch.randn(vocab, hidden, generator=generator).mul_(hidden**-0.5)
    labels = torch.randint(vocab, (tokens, 1), generator=generator).to(machine.device)
    return [x.requires_grad_(), weight.to(machine.device, dtype).requires_grad_(), labels]


def ours(chunk: int | None, into_main_grad: bool = False) -> Callable[..., Tensor]:
    from megatron_trinity.model.loss import Row as Of
    from megatron_trinity.model.loss import token_losses

    group: Any = dist.group.WORLD

    def loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        found = token_losses(
            x,
            weight,
            labels,
            weight.size(0),
            group,
            chunk_size=chunk,
            into_main_grad=into_main_grad,
        )
        return (found[Of.CROSS_ENTROPY] + Z_LOSS * found[Of.LOG_SUM_EXP].square()).sum()

    return loss


def whole(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (x[:, 0] @ weight.t()).to(torch.promote_types(x.dtype, torch.float32))
    cross_entropy = F.cross_entropy(logits, labels[:, 0], reduction="sum")
    return cross_entropy + Z_LOSS * logits.logsumexp(-1).square().sum()


def both_ways(loss: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    total = loss(*given)
    return [total.detach(), *torch.autograd.grad(total, given[:2])]


def values(
    machine: Machine, dtype: torch.dtype, bound: float, sizes: tuple[int, int, int], chunk: int
) -> Iterator[Row]:
    given = tensors(machine, sizes, dtype)
    exact = [t.detach().double().requires_grad_() for t in given[:2]]
    got = both_ways(ours(chunk), given)
    expected = both_ways(whole, [*exact, given[2]])
    name = f"{str(dtype).removeprefix('torch.')}, chunks of {chunk}"
    parts = ("loss", "gradient of the hidden states", "gradient of the head")
    for part, one, other in zip(parts, got, expected, strict=True):
        yield at_most(f"{name}: {part}", distance(one, other), bound)


def costs(machine: Machine, tokens: int, hidden: int, vocab: int) -> Iterator[Row]:
    sizes = (tokens, hidden, vocab)
    name = f"s = {tokens}, h = {hidden}, v = {vocab}, bf16"
    given = tensors(machine, sizes, torch.bfloat16)
    gradients = sum(t.numel() * t.element_size() for t in given[:2])
    sides = {"ours": ours(None), "whole": whole}
    work = {side: partial(both_ways, loss, given) for side, loss in sides.items()}
    times = (1e3 * machine.seconds(work["ours"]), 1e3 * machine.seconds(work["whole"]))
    yield beside(f"{name}: both passes", times, "whole logits", "ms")
    mine, its = ((machine.peak_bytes(work[side]) - gradients) / GIB for side in sides)
    case = f"{name}: peak beside weights and gradients"
    if machine.toy:
        yield measured(case, mine, "GiB", f"whole logits: {its:.3g}")
    else:
        yield at_most(case, mine, TARGET, "GiB")
        yield measured(f"{case}, of whole logits", its, "GiB")
