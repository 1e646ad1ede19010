"""What a run is, in one table at its start."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from megatron_trinity.arguments.stages import unit_of
from megatron_trinity.arguments.written import NAME as ARGUMENTS
from megatron_trinity.data.run_data import RunData
from megatron_trinity.planning.lines import planned_memory
from megatron_trinity.planning.parameters import active_parameters, total_parameters
from megatron_trinity.planning.sizes import ModelSizes
from megatron_trinity.reporting.console import digits
from megatron_trinity.reporting.events import run_folder
from megatron_trinity.reporting.schema import NAME as EVENTS
from megatron_trinity.training.balance import balance_rule
from megatron_trinity.upstream.adaptations import needed_adaptations
from megatron_trinity.upstream.version import installed_megatron_core


def opening(args: Namespace, data: RunData | None, start: int) -> dict[str, str]:
    """The table: its rows by name.

    Args:
        args: checked, with the vocabulary settled.
        data: None for mock data.
        start: iteration that the run goes on behind.
    """
    rows = {
        "model": _model(args),
        "parameters": _parameters(args),
        "layout": _layout(args),
        "precision": _precision(args),
        "memory": planned_memory(args, torch.cuda.is_available()),
        "data": _data(args, data),
        "batch": _batch(args),
        "schedule": _schedule(args),
        "balance": balance_rule(args),
        "evaluation": _evaluation(args, data),
        "checkpoints": _checkpoints(args, start),
        "log": _log(args),
        "software": _software(),
    }
    return {name: text for name, text in rows.items() if text}


def _model(args: Namespace) -> str:
    return (
        f"{args.num_layers} layers, {args.num_dense_layers} of them dense, hidden "
        f"{args.hidden_size}; {args.num_attention_heads} heads of {args.kv_channels}, "
        f"{args.num_query_groups} of keys and values; window {args.sliding_window}, a "
        f"global layer each {args.global_attn_every_n_layers}; {args.num_experts} experts, "
        f"{args.moe_router_topk} a token and {args.num_shared_experts} shared"
    )


def _parameters(args: Namespace) -> str:
    sizes = ModelSizes.from_args(args)
    total, active = total_parameters(sizes), active_parameters(sizes)
    return f"{digits(total)}, {digits(active)} of them for a token; vocabulary {args.vocab_size:,}"


def _layout(args: Namespace) -> str:
    one, many = ("GPU", "GPUs") if torch.cuda.is_available() else ("CPU process", "CPU processes")
    degrees = {
        "data": args.data_parallel_size,
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "virtual pipeline": args.virtual_pipeline_model_parallel_size or 1,
        "context": args.context_parallel_size,
        "expert": args.expert_model_parallel_size,
        "expert tensor": args.expert_tensor_parallel_size or 1,
    }
    words = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    switches = {
        "sequence parallel": args.sequence_parallel,
        "optimizer sharded": args.use_distributed_optimizer,
        f"recompute {args.recompute_granularity}": args.recompute_granularity,
    }
    words += [name for name, on in switches.items() if on]
    ranks = f"{args.world_size:,} {one if args.world_size == 1 else many}"
    return ranks + (f": {', '.join(words)}" if words else "")


def _precision(args: Namespace) -> str:
    name = args.precision or str(args.params_dtype).removeprefix("torch.")
    return f"{name}, layers of {args.transformer_impl}"


def _data(args: Namespace, data: RunData | None) -> str:
    if data is None:
        return "mock data"
    if data.plan is None:
        return "none to train on"
    names = [one.name for one in data.plan.given(0)]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more}; sequences of {args.seq_length:,}"


def _batch(args: Namespace) -> str:
    sequences = args.global_batch_size
    ramp = "" if args.rampup_batch_size is None else ", at the end of its ramp"
    return (
        f"{sequences:,} sequences = {sequences * args.seq_length:,} tokens a step{ramp}; "
        f"micro-batch {args.micro_batch_size}"
    )


def _schedule(args: Namespace) -> str:
    if args.skip_train:
        return "no training, evaluation alone"
    unit = unit_of(args)
    length = getattr(args, f"train_{unit}")
    samples = length if unit == "samples" else length * args.global_batch_size
    called = {"iters": "steps", "samples": "samples"}[unit]
    warm = getattr(args, f"lr_warmup_{unit}") or args.lr_warmup_fraction or 0
    parts = [
        f"{length:,} {called}, {digits(samples * args.seq_length)} tokens",
        f"warm-up {warm:,}",
    ]
    decay = getattr(args, f"lr_wsd_decay_{unit}")
    if args.lr_decay_style == "WSD" and decay is not None:
        parts.append(f"{args.lr_wsd_decay_style} decay of the last {decay:,}")
    else:
        parts.append(f"decay {args.lr_decay_style}")
    rates = f"{args.optimizer} {args.lr:g} to {args.min_lr:g}"
    if args.adamw_lr is not None and args.optimizer != "adam":
        rates += f", adamw {args.adamw_lr:g}"
    return f"{'; '.join(parts)}; {rates}"


def _evaluation(args: Namespace, data: RunData | None) -> str:
    sets = () if data is None else data.validation
    if not args.eval_iters or (data is not None and not sets):
        return "none"
    names = ", ".join(one.name for one in sets if one.name)
    return f"each {args.eval_interval:,} steps" + (f" of {names}" if names else "")


def _checkpoints(args: Namespace, start: int) -> str:
    begins = f"goes on behind {start:,} of {args.load}" if start else "begins with new weights"
    if not start and args.pretrained_checkpoint:
        begins = f"begins with the weights of {args.pretrained_checkpoint}"
    if not args.save:
        return f"{begins}; saves nothing"
    every = f"each {args.save_interval:,} steps and " if args.save_interval else ""
    return f"{begins}; saves {every}at the end to {args.save}"


def _log(args: Namespace) -> str:
    folder = run_folder(args)
    places = [] if folder is None else [str(Path(folder) / EVENTS), ARGUMENTS]
    if args.tensorboard_dir:
        places.append(f"TensorBoard {args.tensorboard_dir}")
    if args.wandb_project:
        places.append(f"W&B {args.wandb_project}/{args.wandb_exp_name}")
    return ", ".join(places) or "this output alone"


def _software() -> str:
    changes = len(needed_adaptations(torch.cuda.is_available()))
    return (
        f"torch {torch.__version__}, megatron-core {installed_megatron_core()}, adapted in "
        f"{changes} places (docs/upstream.md)"
    )
