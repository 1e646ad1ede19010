"""How fast devices compute and how fast they exchange."""

from __future__ import annotations

import socket
import time
from typing import Any

from megatron_trinity.command_line.node.finding import (
    NOT_HERE,
    Finding,
    Floors,
    judged,
    of_device,
)

SIZE = 8192
"""Rows and columns of the matrices of the product."""

BYTES = 1 << 30
"""Of the tensor that is summed over all devices."""

REPEATS = 20


def speed_findings(floors: Floors) -> list[Finding]:
    """A product on each device, and an all-reduce over all of them."""
    import torch

    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or not count:
        why = "torch sees no CUDA device"
        return [
            Finding(subject, NOT_HERE, why, of_gpu=True) for subject in ("product", "all-reduce")
        ]
    floor = of_device(floors, torch.cuda.get_device_name(0))
    found = [_judge_products([product(f"cuda:{n}", SIZE) for n in range(count)], floor)]
    if count == 1:
        return [*found, Finding("all-reduce", NOT_HERE, "a single device")]
    speed, right = all_reduce(count, BYTES, "cuda")
    wanted = floor.get("all_reduce_gb_per_s", 0)
    words = f"{speed:.0f} GB/s, at least {wanted}" + ("" if right else "; the sum is wrong")
    return [*found, judged("all-reduce", right and speed >= wanted, words, of_gpu=True)]


def _judge_products(products: list[tuple[float, bool]], floor: Floors) -> Finding:
    wanted = floor.get("product_tflops", 0)
    slow = [
        f"GPU {number}: {speed:.0f}{'' if right else ', and wrong'}"
        for number, (speed, right) in enumerate(products)
        if speed < wanted or not right
    ]
    least = min(speed for speed, _ in products)
    words = ", ".join(slow) or f"{least:.0f} on the slowest"
    return judged("product", not slow, f"{words} TFLOP/s, at least {wanted}", of_gpu=True)


def product(device: str, size: int) -> tuple[float, bool]:
    """TFLOP/s of a product in bf16, and whether it is the same each time and what it is to be."""
    import torch

    generator = torch.Generator().manual_seed(1)
    left = torch.randn(size, size, generator=generator).to(device, torch.bfloat16)
    right = torch.randn(size, size, generator=generator).to(device, torch.bfloat16)
    first = left @ right
    begin = _now(device)
    for _ in range(REPEATS):
        result = left @ right
    seconds = (_now(device) - begin) / REPEATS
    exact = left[:8].double().cpu() @ right.double().cpu()
    near = torch.allclose(result[:8].double().cpu(), exact, rtol=2e-2, atol=1e-2 * size**0.5)
    return 2 * size**3 / seconds / 1e12, torch.equal(first, result) and near


def all_reduce(ranks: int, size: int, device: str) -> tuple[float, bool]:
    """GB/s that each rank sends in a sum of `size` bytes over all, and whether it is right."""
    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (ranks, size, device, port, answers), nprocs=ranks)
    speeds = [answers.get() for _ in range(ranks)]
    return min(speed for speed, _ in speeds), all(right for _, right in speeds)


def _rank(rank: int, ranks: int, size: int, device: str, port: int, answers: Any) -> None:
    import torch
    import torch.distributed as dist

    on = f"cuda:{rank}" if device == "cuda" else device
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
    )
    values = torch.full((size // 4,), float(rank + 1), device=on)
    dist.all_reduce(values)
    right = bool((values == ranks * (ranks + 1) // 2).all())
    values.zero_()
    begin = _now(on)
    for _ in range(REPEATS):
        dist.all_reduce(values)
    seconds = (_now(on) - begin) / REPEATS
    answers.put((2 * (ranks - 1) / ranks * size / seconds / 1e9, right))
    dist.destroy_process_group()


def _now(device: str) -> float:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()
