"""How fast is a training step? The tiny preset on the CPU, against transformers' model.

One process, the same weights, tokens, dtype (fp32), number of threads and optimizer (AdamW of
torch, with the same groups and clipping) on both sides, steps taken in turn. Ours is the trainer's
own step: Megatron's schedule, gradient buffers, clipping and optimizer, the loss and what it
reports, the update of expert biases and the observer behind it. The peer is transformers'
`AfmoeForCausalLM` in a plain loop, with the fastest of its experts' implementations, which is found
out first. Fails if the two do not start with the same loss.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.command_line.sides import random_batches, trainers
from megatron_trinity.command_line.single_rank import single_rank_environment
from megatron_trinity.errors import TrinityError, run_command

EXAMPLE = """example:
  python benchmarks/step.py --threads 1 --steps 40
"""

MICRO_BATCH, SEQUENCE = 8, 256
LEARNING_RATE = 1e-3
WARM_UP = 3  # steps of each side that are not counted
TOLERANCE = 1e-4  # between the first losses, nats
EXPERTS = ("eager", "grouped_mm")
"""transformers' implementations of the experts, but for `batched_mm`: it copies an expert's weights
for every token that it gets, and takes twenty times as long."""
TRIAL = 2  # steps that an implementation is tried for, the first not counted

Batch = Mapping[str, Any]
Step = Callable[[Batch], float]  # trains on a batch, returns the loss


@dataclass(frozen=True)
class Times:
    """Seconds of each step of one side."""

    wall: Sequence[float]
    cpu: Sequence[float]  # of this process, all threads: neighbours disturb it less


class Ours:
    """The trainer, built as `megatron_trinity.training.pretrain` builds it, step by step."""

    def __init__(self) -> None:
        from megatron.training.global_vars import set_global_variables
        from megatron.training.initialize import initialize_megatron

        from megatron_trinity.arguments.parse import parse_arguments
        from megatron_trinity.planning.steps import Steps
        from megatron_trinity.training.vocabulary import settle_vocabulary

        self.args = parse_arguments(self._flags())
        set_global_variables(self.args)
        settle_vocabulary(self.args)
        initialize_megatron()
        self._steps = Steps(self.args, *trainers(self.args))
        self.model = self._steps.model

    def step(self, batch: Batch) -> float:
        losses, *_ = self._steps.step(batch)
        return float(losses["lm loss"])

    @staticmethod
    def _flags() -> list[str]:
        options = {
            "--preset": "tiny",
            "--optimizer": "adam",
            "--lr": LEARNING_RATE,
            "--lr-decay-style": "constant",
            "--micro-batch-size": MICRO_BATCH,
            "--global-batch-size": MICRO_BATCH,
            "--seq-length": SEQUENCE,
            "--tokenizer-type": "NullTokenizer",
            "--train-iters": 10**6,
        }
        return [*(str(word) for pair in options.items() for word in pair), "--mock-data"]


class Peer:
    """transformers' model of the same weights, in a plain training loop."""

    def __init__(self, ours: Ours, experts: str) -> None:
        import torch
        from transformers import AfmoeForCausalLM

        from megatron_trinity.checkpoint.hf.config import hf_config_from_args
        from megatron_trinity.checkpoint.hf.mapping import to_hf
        from megatron_trinity.model.shards import whole_tensors

        args = ours.args
        config = hf_config_from_args(args)
        config._attn_implementation = "sdpa"
        config._experts_implementation = experts
        config.use_cache = False
        self._model = AfmoeForCausalLM(config).train()
        weights = to_hf(whole_tensors(ours.model[0].module), config, experts="fused")
        self._model.load_state_dict(weights)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        decayed = [p for p in self._parameters if p.ndim > 1]
        others = [p for p in self._parameters if p.ndim == 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others}],
            lr=args.lr,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_eps,
            weight_decay=0.0,
        )
        self._clip = args.clip_grad

    def step(self, batch: Batch) -> float:
        import torch

        self._optimizer.zero_grad()
        labels = batch["labels"]
        loss = self._model(batch["tokens"], shift_labels=labels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        return float(loss.detach())


def fastest_peer(ours: Ours, data: Iterator[Batch]) -> tuple[str, Peer]:
    """The peer with the experts' implementation that takes the least CPU time here."""
    seconds = {}
    for experts in EXPERTS:
        peer = Peer(ours, experts)
        times = alternate({experts: peer.step}, data, TRIAL, warm_up=1)[experts]
        seconds[experts] = statistics.median(times.cpu)
        print(f"transformers, {experts}: {seconds[experts]:.3f} s", file=sys.stderr, flush=True)
    fastest = min(seconds, key=lambda name: seconds[name])
    return fastest, Peer(ours, fastest)


def alternate(
    sides: Mapping[str, Step], data: Iterator[Batch], steps: int, warm_up: int = WARM_UP
) -> dict[str, Times]:
    """Let the sides take the same steps in turn, the order turned around from step to step."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + steps):
        batch = next(data)
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            began, cpu_began = time.perf_counter(), time.process_time()
            sides[name](batch)
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - cpu_began)
    return {name: Times(wall[name][warm_up:], cpu[name][warm_up:]) for name in sides}


def check_same_start(ours: Step, peer: Step, batch: Batch) -> None:
    """Raises: TrinityError if the losses of the first step, before any update, differ."""
    mine, its = ours(batch), peer(batch)
    if abs(mine - its) > TOLERANCE:
        raise TrinityError(f"the first losses differ: ours {mine:.6f}, transformers {its:.6f}")


def rows(times: Mapping[str, Times], threads: int) -> list[Row]:
    """What `--json` writes: tokens per second of both sides, from medians."""
    tokens = MICRO_BATCH * SEQUENCE
    result = []
    for clock in ("cpu", "wall"):
        ours, peer = (
            tokens / statistics.median(getattr(times[side], clock)) for side in ("ours", "peer")
        )
        case = f"training step, {threads} thread{'s' * (threads > 1)}, {clock} time"
        result.append(make_row(case, ours, peer, "tokens/s", more_is_better=True))
    return result


def spread(times: Sequence[float]) -> str:
    """Quartiles of the steps, in ms."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return f"{1e3 * middle:.0f} ({1e3 * low:.0f} to {1e3 * high:.0f})"


def show(times: Mapping[str, Times], table_rows: Sequence[Row], title: str) -> None:
    out = Table(title=title)
    for column in ("", "ours, ms (quartiles)", "transformers, ms (quartiles)"):
        out.add_column(column, justify="right" if column else "left")
    for column in ("ours, tokens/s", "transformers, tokens/s", "ratio"):
        out.add_column(column, justify="right")
    for clock, row in zip(("cpu", "wall"), table_rows, strict=True):
        out.add_row(
            row["case"],
            *(spread(getattr(times[side], clock)) for side in ("ours", "peer")),
            f"{row['ours']:.0f}",
            f"{row['peer']:.0f}",
            f"{row['ratio']:.2f}",
        )
    Console(width=140).print(out)


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--steps", type=int, default=40, help="a side (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    add_json_argument(parser)
    parser.add_argument("--quick", action="store_true", help="8 steps a side")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps = 8
    if arguments.steps < 4 or arguments.threads < 1:
        parser.error("--steps has to be at least 4, --threads at least 1")
    return arguments


def start_alone(threads: int) -> None:
    """Set up this process as the only rank; before torch is imported, which reads the threads."""
    os.environ |= single_rank_environment()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # The trainer runs where there is no GPU; where there is one, both sides would use it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()


def main() -> None:
    arguments = parse_arguments()
    start_alone(arguments.threads)
    with contextlib.redirect_stdout(io.StringIO()):  # what Megatron says at its start
        ours = Ours()
    data = random_batches(MICRO_BATCH, SEQUENCE, ours.args.vocab_size)
    experts, peer = fastest_peer(ours, data)
    check_same_start(ours.step, peer.step, next(data))
    times = alternate({"ours": ours.step, "peer": peer.step}, data, arguments.steps)
    table_rows = rows(times, arguments.threads)
    title = f"medians of {arguments.steps} steps; transformers with experts {experts}"
    show(times, table_rows, title)
    write_rows(arguments.json, table_rows)


if __name__ == "__main__":
    run_command(main)
