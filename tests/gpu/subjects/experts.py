"""Products of the routed experts: torch's grouped product against fp64, beside one an expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tests.gpu.machine import Machine, distance, start
from tests.gpu.rows import Row, at_most, beside, skipped

BOUND = 2.0**-8
"""In bf16 a result is rounded once, to 2^-9 at most; sums are fp32."""


def rows(machine: Machine) -> Iterator[Row]:
    start(machine)
    cases = {
        "nano, EP 8": machine.size((32768, 16, 1024, 512), (96, 4, 64, 32)),
        "mini, EP 8": machine.size((32768, 16, 2048, 2048), (96, 4, 32, 64)),
        "large, EP 8": machine.size((32768, 32, 3072, 6144), (160, 8, 48, 96)),
    }
    with machine.kernels():
        for name, sizes in cases.items():
            yield from of_case(machine, name, *sizes)


def of_case(
    machine: Machine, name: str, tokens: int, experts: int, width: int, out: int
) -> Iterator[Row]:
    from megatron_trinity.model.grouped_product import (
        grouped_linear,
        has_kernel,
        product_by_group,
    )

    if not has_kernel(machine.device, torch.bfloat16):
        yield skipped(f"{name}: grouped product", "torch has no kernel for this GPU")
        return
    generator = torch.Generator().manual_seed(1)
    drawn = ((tokens, width), (experts, out, width), (tokens, out))
    x, stack, g = (
        torch.randn(shape, generator=generator).to(machine.device, torch.bfloat16)
        for shape in drawn
    )
    weights = [weight.detach().requires_grad_() for weight in stack]
    x.requires_grad_()
    # Uneven, and one expert without a token.
    shares = torch.rand(experts, generator=generator)
    shares[1] = 0
    counts = (shares / shares.sum() * tokens).long()
    counts[0] += tokens - counts.sum()
    grouped = product_by_group(x, counts.to(machine.device), (width, out))

    got = both_ways(lambda x, w: grouped(x, w), x, weights, g)
    exact = [weight.detach().double().requires_grad_() for weight in weights]
    expected = both_ways(
        lambda x, w: plain(x, counts.tolist(), w),
        x.detach().double().requires_grad_(),
        exact,
        g.double(),
    )
    parts = ("output", "gradient of the input", "gradients of the weights")
    for part, one, other in zip(parts, got, expected, strict=True):
        yield at_most(f"{name}, bf16: {part}", distance(one, other), BOUND)

    def one_by_one(x: Tensor, weights: list[Tensor]) -> Tensor:
        return grouped_linear(x, counts.tolist(), weights)

    times = (
        1e3 * machine.seconds(lambda: both_ways(grouped, x, weights, g)),
        1e3 * machine.seconds(lambda: both_ways(one_by_one, x, weights, g)),
    )
    yield beside(f"{name}: both passes", times, "a product for each expert", "ms")


def both_ways(
    product: Callable[[Tensor, list[Tensor]], Tensor], x: Tensor, weights: list[Tensor], g: Tensor
) -> list[Tensor]:
    out = product(x, weights)
    of_x, *of_weights = torch.autograd.grad(out, (x, *weights), g)
    return [out.detach(), of_x, torch.stack(of_weights)]


def plain(x: Tensor, counts: list[int], weights: list[Tensor]) -> Tensor:
    parts = zip(x.split(counts), weights, strict=True)
    return torch.cat([rows @ weight.t() for rows, weight in parts])
