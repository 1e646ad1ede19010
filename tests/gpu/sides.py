"""The training steps that are timed: the trainer's own, megatron-core's model, transformers'.

Each in a process of its own, so that its memory is its own: python -m tests.gpu.sides SIDE FILE
[the trainer's flags]; the figures are written to FILE by rank 0.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_trinity.command_line.sides import Side, megatron_cores, random_batches, trainers

if TYPE_CHECKING:
    from megatron_trinity.planning.steps import Steps

Batch = Mapping[str, Tensor]
TOY = "--use-cpu-initialization"
"""Of the flags of a run at toy size: on a CPU it is the default, and changes nothing."""
STEPS, WARM_UP = 10, 3
NODE = 8  # GPUs
TRANSFORMERS = "transformers"


def steps(side: Callable[[Namespace], Side], args: Namespace) -> Steps:
    """The steps of Megatron's loop on one side of a comparison."""
    from megatron_trinity.planning.steps import Steps

    return Steps(args, *side(args))


class TransformersSide:
    """transformers' AfMoE in bf16 with torch's fused AdamW, in a plain loop."""

    def __init__(self, args: Namespace) -> None:
        from transformers import AfmoeForCausalLM

        from megatron_trinity.checkpoint.hf.config import hf_config_from_args

        config = hf_config_from_args(args)
        config._attn_implementation = "sdpa"
        config._experts_implementation = "grouped_mm"
        config.use_cache = False
        self._device = torch.device("cpu" if not args.on_gpu else "cuda")
        with self._device:
            self.model = AfmoeForCausalLM(config).to(torch.bfloat16).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=args.on_gpu)

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        tokens, labels = (batch[name].to(self._device) for name in ("tokens", "labels"))
        self.model(tokens, shift_labels=labels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


SIDES: dict[str, Callable[[Namespace], Any]] = {
    "ours": partial(steps, trainers),
    "megatron-core": partial(steps, megatron_cores),
    TRANSFORMERS: TransformersSide,
}


def start(flags: list[str], toy: bool) -> Namespace:
    """This process as a rank; returns Megatron's arguments."""
    from megatron_trinity.command_line.single_rank import single_rank_environment

    os.environ |= {k: v for k, v in single_rank_environment().items() if k not in os.environ}

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()

    from megatron.training.global_vars import set_global_variables
    from megatron.training.initialize import initialize_megatron

    from megatron_trinity.arguments.parse import parse_arguments
    from megatron_trinity.training.vocabulary import settle_vocabulary

    args = parse_arguments(flags)
    set_global_variables(args)
    settle_vocabulary(args)
    initialize_megatron()
    args.on_gpu = not toy
    return args


def figures(args: Namespace, side: Any) -> dict[str, float]:
    """Seconds of a step and of its optimizer, bytes after steps and at their peak."""
    seed = 5 + int(os.environ["RANK"])
    data = random_batches(args.micro_batch_size, args.seq_length, args.vocab_size, seed)
    spent = timed(side.optimizer, "step", args.on_gpu)
    taken, of_optimizer = [], []
    for number in range(WARM_UP + (STEPS if args.on_gpu else 1)):
        batch = next(data)
        if number == WARM_UP:
            wait(args.on_gpu)
            torch.cuda.reset_peak_memory_stats()
        wait(args.on_gpu)
        spent.clear()
        began = time.perf_counter()
        side.step(batch)
        wait(args.on_gpu)
        taken.append(time.perf_counter() - began)
        of_optimizer.append(sum(spent))
    del batch
    return {
        "seconds": statistics.median(taken[WARM_UP:]),
        "optimizer": statistics.median(of_optimizer[WARM_UP:]),
        "state": torch.cuda.memory_allocated() if args.on_gpu else bytes_of_tensors(),
        "peak": torch.cuda.max_memory_allocated(),
    }


def timed(owner: Any, name: str, on_gpu: bool) -> list[float]:
    """Seconds of each call of a method from now on; it is waited for, ahead and behind."""
    original, spent = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        wait(on_gpu)
        began = time.perf_counter()
        result = original(*args, **kwargs)
        wait(on_gpu)
        spent.append(time.perf_counter() - began)
        return result

    setattr(owner, name, call)
    return spent


def wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def bytes_of_tensors() -> int:
    """Of every tensor that is alive: what an allocator of its own would tell."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and not isinstance(thing, torch._subclasses.FakeTensor):
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def estimate(args: Namespace) -> dict[str, float]:
    """What planning says of this rank: bytes of its state and at its peak, seconds of its step on
    a card that it knows, FLOPs of its micro-batch."""
    from megatron.core import parallel_state

    from megatron_trinity.planning.estimate import estimate as estimate_time
    from megatron_trinity.planning.flops import pairs_of_layers, training_flops
    from megatron_trinity.planning.kernels import on_gpu
    from megatron_trinity.planning.machines import machines
    from megatron_trinity.planning.memory import stage_memory
    from megatron_trinity.planning.sizes import ModelSizes
    from megatron_trinity.planning.stages import stage_chunks

    stage = parallel_state.get_pipeline_model_parallel_rank()
    kernels = on_gpu(args)
    memory = stage_memory(args, kernels, stage, stage_chunks(args)[stage])
    sizes = ModelSizes.from_args(args)
    lengths = [args.seq_length] * args.micro_batch_size
    tokens = args.seq_length * args.micro_batch_size
    flops = training_flops(sizes, tokens, *pairs_of_layers(sizes, lengths))
    found: dict[str, float] = {"planned state": memory.state.total, "planned peak": memory.peak}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for name, machine in machines().items():
        if name.upper() in card.split():
            found["planned seconds"] = estimate_time(args, kernels, machine, NODE).step
    return {**found, "flops": flops, "tokens": tokens}


def main() -> None:
    name, file, *flags = sys.argv[1:]
    toy = TOY in flags
    args = start(flags, toy)
    side = SIDES[name](args)
    found = figures(args, side)
    if name != TRANSFORMERS:
        found |= estimate(args)
    if os.environ["RANK"] == "0":
        Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
