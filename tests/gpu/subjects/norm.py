"""The norm's kernels against the formula in fp64, at the widths of the presets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.machine import Machine, distance, start
from tests.gpu.rows import Row, at_most, beside

EPSILON = 1e-5
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
"""In bf16 the result is rounded once, to 2^-9 at most."""
OF_GAIN = 1e-5  # a sum over all tokens in fp32, whatever the dtype of the hidden states


def rows(machine: Machine) -> Iterator[Row]:
    start(machine)
    shapes = {
        "hidden states of nano": machine.size((8192, 1024), (48, 64)),
        "hidden states of large": machine.size((8192, 3072), (16, 192)),
        "queries": machine.size((8192 * 8, 128), (96, 32)),
    }
    with machine.kernels():
        for name, shape in shapes.items():
            for dtype, bound in BOUNDS.items():
                yield from of_case(machine, name, shape, dtype, bound)


def of_case(
    machine: Machine, name: str, shape: tuple[int, int], dtype: torch.dtype, bound: float
) -> Iterator[Row]:
    from megatron_trinity.model import compiling, norm

    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(shape, generator=generator).to(machine.device, dtype) for _ in range(2))
    gain = (1 + 0.2 * torch.randn(shape[1], generator=generator)).to(machine.device)
    if not compiling.compiles(x):
        raise AssertionError("the norm would not be compiled")

    def ours(x: Tensor, gain: Tensor) -> Tensor:
        result: Tensor = norm._RMSNorm.apply(x, gain, EPSILON, None)
        return result

    def plain(x: Tensor, gain: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * gain

    got = both_ways(ours, x, gain, g)
    expected = both_ways(plain, x.double(), gain.double(), g.double())
    parts = ("output", "gradient of the input", "gradient of the gain")
    for part, one, other in zip(parts, got, expected, strict=True):
        allowed = OF_GAIN if part == parts[-1] else bound
        yield at_most(f"{name}, {dtype_name(dtype)}: {part}", distance(one, other), allowed)

    def copied(x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x.float(), gain.shape, gain, EPSILON).to(x.dtype)

    times = (
        1e3 * machine.seconds(lambda: both_ways(ours, x, gain, g)),
        1e3 * machine.seconds(lambda: both_ways(copied, x, gain, g)),
    )
    yield beside(
        f"{name}, {dtype_name(dtype)}: both passes",
        times,
        "torch's, which keeps an fp32 copy",
        "ms",
        at_least=0.95,
    )


def both_ways(function: object, x: Tensor, gain: Tensor, g: Tensor) -> list[Tensor]:
    x, gain = (tensor.detach().requires_grad_() for tensor in (x, gain))
    y = function(x, gain)  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, (x, gain), g)]


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
