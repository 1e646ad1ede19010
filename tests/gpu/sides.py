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
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
TOY = "--use-cpu-initialization"
"""Of the flags of a run at toy size: on a CPU it is the default, and changes nothing."""
STEPS, WARM_UP = 10, 3


def batches(args: Namespace) -> Iterator[Batch]:
    """Endless micro-batches of random tokens, in the form of the trainer's data loader."""
    generator = torch.Generator().manual_seed(5 + int(os.environ["RANK"]))
    shape = (args.micro_batch_size, args.seq_length + 1)
    while True:
        tokens = torch.randint(args.vocab_size, shape, generator=generator)
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(shape[0], args.seq_length),
            "position_ids": torch.arange(args.seq_length).repeat(shape[0], 1),
        }


class MegatronSide:
    """A model of megatron-core's kind, its optimizer and the steps of Megatron's loop."""

    def __init__(self, args: Namespace, model_config: Any, forward_step: Callable[..., Any]):
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.enums import ModelType
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.utils import get_model_config
        from megatron.training import get_timers, training

        from megatron_trinity.training.optimizer import container_from_args

        self._args, self._forward_step = args, forward_step
        self.model, self.optimizer, self._scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=container_from_args(args, model_config),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self._schedule = get_forward_backward_func()
        self._config = get_model_config(self.model[0])
        self._config.grad_scale_func = self.optimizer.scale_loss
        self._config.timers = get_timers()
        self._config.finalize_model_grads_func = finalize_model_grads
        for chunk in self.model:
            chunk.train()
        args.curr_iteration = 0

    def step(self, batch: Batch) -> None:
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.training import training

        training.train_step(
            self._forward_step,
            RerunDataIterator(iter([batch])),
            self.model,
            self.optimizer,
            self._scheduler,
            self._config,
            self._schedule,
            self._args.curr_iteration,
        )
        self._args.curr_iteration += 1


def ours(args: Namespace) -> MegatronSide:
    from megatron_trinity.model.config import model_config_from_args
    from megatron_trinity.training.flops import StepFlops
    from megatron_trinity.training.forward_step import forward_step
    from megatron_trinity.training.micro_batches import MicroBatchRecord
    from megatron_trinity.training.observer import StepObserver
    from megatron_trinity.training.optimizer import set_up_optimizer
    from megatron_trinity.upstream.training_hooks import set_training_hooks

    record, flops = MicroBatchRecord(), StepFlops(args)
    set_training_hooks(StepObserver(args, record, flops))
    set_up_optimizer(args)
    step = partial(forward_step, record=record, flops=flops)
    return MegatronSide(args, model_config_from_args(args), step)


def megatrons(args: Namespace) -> MegatronSide:
    """Its GPTModel of the same shape, hence of equal FLOPs, with its own layers and loss."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.argument_utils import (
        core_transformer_config_from_args,
        gpt_config_from_args,
    )

    config = core_transformer_config_from_args(args, TransformerConfig)
    model_config = gpt_config_from_args(args, config=config)
    modules = args.transformer_impl == "transformer_engine"
    model_config.transformer_layer_spec = lambda _: get_gpt_decoder_block_spec(config, modules)
    return MegatronSide(args, model_config, megatrons_forward_step)


def megatrons_forward_step(data_iterator: Iterator[Any], model: Any) -> Any:
    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(data_iterator).items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(output: Tensor) -> Any:
        mask = batch["loss_mask"].view(-1).float()
        total = torch.sum(output.view(-1).float() * mask)
        tokens = mask.sum().clone().detach().to(torch.int)
        report = torch.cat([total.clone().detach().view(1), tokens.view(1)])
        return total, tokens, {"lm loss": report}

    return output, loss


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
    "ours": ours,
    "megatron-core": megatrons,
    "transformers": TransformersSide,
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
    data = batches(args)
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


def estimate(args: Namespace, side: MegatronSide) -> dict[str, float]:
    """What planning says of this rank: bytes of its state and FLOPs of its micro-batch."""
    from megatron.core import parallel_state

    from megatron_trinity.planning.flops import pairs_of_layers, training_flops
    from megatron_trinity.planning.parameters import training_state_bytes
    from megatron_trinity.planning.sizes import ModelSizes

    numels = {True: 0, False: 0}
    largest = 0
    for chunk in side.model:
        for name, parameter in chunk.named_parameters():
            numels[".experts.experts." in name or ".experts.linear_fc" in name] += parameter.numel()
            if parameter.ndim == 2 and "word_embeddings" not in name and "output" not in name:
                largest = max(largest, parameter.numel())
    ranks = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_expert_data_parallel_world_size(),
    )
    state = training_state_bytes(numels[False], numels[True], *ranks, largest)
    sizes = ModelSizes.from_args(args)
    lengths = [args.seq_length] * args.micro_batch_size
    tokens = args.seq_length * args.micro_batch_size
    flops = training_flops(sizes, tokens, *pairs_of_layers(sizes, lengths))
    return {"planned state": state, "flops": flops, "tokens": tokens}


def main() -> None:
    name, file, *flags = sys.argv[1:]
    toy = TOY in flags
    args = start(flags, toy)
    side = SIDES[name](args)
    found = figures(args, side)
    if isinstance(side, MegatronSide):
        found |= estimate(args, side)
    if os.environ["RANK"] == "0":
        Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
