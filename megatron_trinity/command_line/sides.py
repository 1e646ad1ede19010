"""What steps of training are compared: the trainer's, and those of megatron-core's own model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

Side = tuple[Any, Callable[..., Any]]
"""What `megatron_trinity.planning.steps.Steps` takes: a configuration and a forward step."""


def trainers(args: Namespace) -> Side:
    """The trainer's model, as `megatron_trinity.training.pretrain` sets it up."""
    from megatron_trinity.model.config import model_config_from_args
    from megatron_trinity.training.flops import StepFlops
    from megatron_trinity.training.forward_step import forward_step
    from megatron_trinity.training.micro_batches import MicroBatchRecord
    from megatron_trinity.training.observer import StepObserver
    from megatron_trinity.training.optimizer import container_from_args, set_up_optimizer
    from megatron_trinity.upstream.training_hooks import set_training_hooks

    record, flops = MicroBatchRecord(), StepFlops(args)
    set_training_hooks(StepObserver(args, record, flops))
    set_up_optimizer(args)
    container = container_from_args(args, model_config_from_args(args))
    return container, partial(forward_step, record=record, flops=flops)


def megatron_cores(args: Namespace) -> Side:
    """Its GPTModel of the same shape, hence of equal FLOPs, with its own layers, loss and Muon."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.argument_utils import (
        core_transformer_config_from_args,
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )

    from megatron_trinity.upstream.optimizer_factory import set_optimizer_factory
    from megatron_trinity.upstream.parameter_layout import set_parameter_layout
    from megatron_trinity.upstream.training_hooks import set_training_hooks

    set_training_hooks(None)
    set_optimizer_factory(None)
    set_parameter_layout(None)
    # Its default; "duplicated", the trainer's, gathers each matrix over the one tensor rank.
    args.muon_tp_mode = "blockwise"
    config = core_transformer_config_from_args(args, TransformerConfig)
    model_config = gpt_config_from_args(args, config=config)
    modules = args.transformer_impl == "transformer_engine"
    model_config.transformer_layer_spec = lambda _: get_gpt_decoder_block_spec(config, modules)
    container = pretrain_cfg_container_from_args(args, model_config)
    if args.use_layer_wise_distributed_optimizer:  # so Megatron calls sharding under muon
        _share_out_matrices(container)
    return container, _forward_step


def _share_out_matrices(container: Any) -> None:
    """What `wrap_model_chunks_with_ddp` of megatron-core does for its own sharded Muon."""
    from megatron.core.optimizer.layer_wise_optimizer import (
        LayerWiseDistributedOptimizer,
        tag_params_for_buffer_routing,
    )

    from megatron_trinity.upstream.parameter_layout import set_parameter_layout

    def tagged(chunks: Any) -> Any:
        tag_params_for_buffer_routing(chunks)
        return chunks

    container.ddp.use_distributed_optimizer = True
    container.model.pre_wrap_hooks.append(tagged)
    set_parameter_layout(LayerWiseDistributedOptimizer.compute_full_param_layout)


def _forward_step(data_iterator: Iterator[Any], model: Any) -> Any:
    """As Megatron's `pretrain_gpt.py` has it."""
    import torch

    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(data_iterator).items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(output: Any) -> Any:
        mask = batch["loss_mask"].view(-1).float()
        total = torch.sum(output.view(-1).float() * mask)
        tokens = mask.sum().clone().detach().to(torch.int)
        report = torch.cat([total.clone().detach().view(1), tokens.view(1)])
        return total, tokens, {"lm loss": report}

    return output, loss


def random_batches(
    micro_batch: int, seq_length: int, vocab_size: int, seed: int = 5
) -> Iterator[dict[str, Any]]:
    """Endless micro-batches of random tokens, in the form of the trainer's data loader."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(vocab_size, (micro_batch, seq_length + 1), generator=generator)
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(micro_batch, seq_length),
            "position_ids": torch.arange(seq_length).repeat(micro_batch, 1),
        }
