"""What do the LM head and the loss cost in time and memory, with logits in chunks and held whole?

Forward and backward of the head and the losses of tokens, with z-loss, fp32, against the plain way:
one product gives all logits, and passes in their place give the losses and, in the same buffer, the
gradient. Alternating in one process; peak memory, gradients
included, in a process of its own each. First as `tiny` trains, where all logits are one chunk, then
a larger vocabulary in chunks, which are computed twice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_trinity.command_line.parser import command_parser, require_at_least_one
from megatron_trinity.command_line.peak_memory import peak_memory
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.command_line.single_rank import start_single_rank_group
from megatron_trinity.errors import run_command

EXAMPLE = """example:
  OMP_NUM_THREADS=1 python benchmarks/loss.py
"""
Z_LOSS = 1e-3
MIB = 2**20
Tensors = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """Sizes, and the tokens of a chunk of ours."""

    tokens: int
    hidden: int
    vocab: int
    chunk: int

    @property
    def name(self) -> str:
        chunks = -(-self.tokens // self.chunk)
        return f"{self.tokens} x {self.hidden} x {self.vocab}, chunks: {chunks}"


CASES = (
    Case(2048, 192, 2048, chunk=2048),
    Case(2048, 192, 16384, chunk=2048),
    Case(2048, 192, 16384, chunk=256),
)
QUICK = (Case(2048, 192, 2048, chunk=2048), Case(1024, 192, 16384, chunk=128))


class WholeLogits(torch.autograd.Function):
    """Cross entropy and logsumexp `[n]` of logits `[n, v]`, in the place of one fp32 copy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        ctx.dtype = logits.dtype
        x = logits.to(torch.float32)
        highest = x.amax(-1, keepdim=True)
        x.sum(-1)  # the mean logit, of the log
        x.sub_(highest)
        target = x.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        exp_sum = x.exp_().sum(-1)
        ctx.save_for_backward(x, exp_sum, labels)
        log_sum = exp_sum.log()
        return log_sum - target, log_sum + highest.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_cross_entropy, of_log_sum_exp = gradients
        x, exp_sum, labels = ctx.saved_tensors
        x.mul_(((of_cross_entropy + of_log_sum_exp) / exp_sum).unsqueeze(-1))
        x.scatter_add_(-1, labels.unsqueeze(-1), -of_cross_entropy.unsqueeze(-1))
        return x.to(ctx.dtype), None


def peer(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses: tuple[Tensor, Tensor] = WholeLogits.apply(hidden[:, 0] @ weight.t(), labels[:, 0])
    return losses


def ours(chunk: int) -> Loss:
    from megatron_trinity.model.loss import Row as Of
    from megatron_trinity.model.loss import token_losses

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        group = dist.group.WORLD
        assert group is not None
        losses = token_losses(hidden, weight, labels, weight.size(0), group, chunk_size=chunk)
        return losses[Of.CROSS_ENTROPY, :, 0], losses[Of.LOG_SUM_EXP, :, 0]

    return loss


def kinds(case: Case) -> Mapping[str, Loss]:
    return {"ours": ours(case.chunk), "peer": peer}


def tensors(case: Case) -> Tensors:
    """Hidden states `[s, 1, h]`, the head `[v, h]` and labels `[s, 1]`."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(case.tokens, 1, case.hidden, generator=generator)
    weight = torch.randn(case.vocab, case.hidden, generator=generator) * case.hidden**-0.5
    labels = torch.randint(case.vocab, (case.tokens, 1), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def forward_and_backward(loss: Loss, given: Tensors) -> list[Tensor]:
    cross_entropy, log_sum_exp = loss(*given)
    total = (cross_entropy + Z_LOSS * log_sum_exp.square()).sum()
    return [cross_entropy.detach(), *torch.autograd.grad(total, given[:2])]


def seconds(case: Case, repetitions: int) -> dict[str, float]:
    """Medians of alternating runs; the first of each is a warm-up, and shows that they agree."""
    given = tensors(case)
    losses = kinds(case)
    for mine, its in zip(
        *(forward_and_backward(loss, given) for loss in losses.values()), strict=True
    ):
        scale = its.abs().max().item()
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-5 * scale)
    taken: dict[str, list[float]] = {kind: [] for kind in losses}
    for _ in range(repetitions):
        for kind, loss in losses.items():
            # Of this process: neighbours on a busy machine disturb it less than wall time.
            began = time.process_time()
            forward_and_backward(loss, given)
            taken[kind].append(time.process_time() - began)
    return {kind: statistics.median(times) for kind, times in taken.items()}


def memory(case: Case, kind: str) -> float:
    """MiB above what a process has with its tensors made."""

    def prepare() -> Callable[[], object]:
        start_single_rank_group()  # here: gloo's threads do not survive a fork either
        given, loss = tensors(case), kinds(case)[kind]
        return lambda: forward_and_backward(loss, given)

    return peak_memory(prepare) / MIB


def table(found: list[Row]) -> Table:
    out = Table("case", "ours", "whole logits", "unit", "ratio")
    for row in found:
        out.add_row(
            row["case"],
            f"{row['ours']:.1f}",
            f"{row['peer']:.1f}",
            row["unit"],
            f"{row['ratio']:.2f}",
        )
    return out


def main() -> None:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--repetitions", type=int, default=7, help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, within a minute")
    add_json_argument(parser)
    arguments = parser.parse_args()
    require_at_least_one("--repetitions", arguments.repetitions)

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()
    cases = QUICK if arguments.quick else CASES
    # Memory first: autograd's threads, once started, do not survive a fork.
    peaks = {case: {kind: memory(case, kind) for kind in kinds(case)} for case in cases}
    start_single_rank_group()
    found = []
    for case in cases:
        taken = {kind: 1000 * s for kind, s in seconds(case, arguments.repetitions).items()}
        for what, unit, values in (
            ("forward and backward, CPU time", "ms", taken),
            ("peak memory", "MiB", peaks[case]),
        ):
            found.append(make_row(f"{what}: {case.name}", values["ours"], values["peer"], unit))
    Console(width=110).print(table(found))
    write_rows(arguments.json, found)


if __name__ == "__main__":
    run_command(main)
