"""A plan in tables, and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_trinity.planning.activations import recomputed_modules
from megatron_trinity.planning.flops import BACKWARD, forward_parts, pairs_of_layers
from megatron_trinity.planning.layout_check import describe
from megatron_trinity.planning.memory import StageMemory
from megatron_trinity.planning.plan import Plan
from megatron_trinity.planning.sizes import ModelSizes
from megatron_trinity.tables import print_table

GB = 1e9
HOURS = 3600


def command(plan: Plan) -> str:
    """The trainer's command line, without data."""
    words = ["--preset", plan.goal.preset, *plan.flags]
    return f"pretrain_trinity.py {shlex.join(words)}"


def print_layouts(plans: Sequence[Plan]) -> None:
    """Layouts side by side, best first."""
    columns = ("", "DP", "TP", "PP x chunks", "EP", "CP", "peak GB", "step s", "MFU %", "recompute")
    rows = []
    for number, plan in enumerate(plans, 1):
        a, time = plan.args, plan.time
        chunks = a.virtual_pipeline_model_parallel_size or 1
        again = a.recompute_granularity or "none"
        if again == "selective":
            again = " ".join(recomputed_modules(a))
        rows.append(
            (
                *(number, a.data_parallel_size, a.tensor_model_parallel_size),
                f"{a.pipeline_model_parallel_size} x {chunks}",
                *(a.expert_model_parallel_size, a.context_parallel_size),
                *(f"{plan.fullest.peak / GB:.1f}", f"{time.step:.2f}", f"{100 * time.mfu:.1f}"),
                again,
            )
        )
    print_table("layouts", columns, rows)
    for number, plan in enumerate(plans, 1):
        print(f"{number}: {command(plan)}")


def print_plan(plan: Plan) -> None:
    """All that is known of one."""
    print_table(
        "memory of the fullest rank of each stage, GB",
        (
            *("stage", "layers", "weights", "gradients", "optimizer", "FP8 copies", "kept", "work"),
            *("peak", "at"),
        ),
        [_memory_row(stage) for stage in plan.memory],
    )
    parts = plan.fullest.kept
    print_table(
        f"kept for backward on stage {plan.fullest.stage}, GB",
        ("part", "GB"),
        [(part, f"{size / GB:.3f}") for part, size in parts.most_common() if size],
    )
    print_table("model FLOPs of a token, forward and backward", ("part", "MFLOPs"), _flops(plan))
    print_table(
        f"what a rank of stage {plan.fullest.stage} sends in a step",
        ("collective", "group", "ranks", "GB", "calls", "waited for"),
        [
            (t.kind, t.group, t.ranks, f"{t.sent / GB:.3f}", t.calls, not t.hidden)
            for t in sorted(plan.traffic(), key=lambda t: -t.sent)
        ],
    )
    print_table("time of a step", ("part", "seconds"), _time_rows(plan))
    for line in length_lines(plan):
        print(line)
    print(f"assumed, none of it measured: {'; '.join(plan.goal.assumed.told())}")
    print(f"{plan.goal.machine.name}: {plan.goal.machine.source}")


def _memory_row(stage: StageMemory) -> tuple[object, ...]:
    state = stage.state
    sizes = (state.weights, state.gradients, state.optimizer, stage.copies, stage.kept.total())
    figures = (f"{size / GB:.2f}" for size in (*sizes, stage.working, stage.peak))
    holds = "; ".join(describe(chunk) for chunk in stage.chunks)
    return (stage.stage, holds, *figures, stage.moment)


def _flops(plan: Plan) -> list[tuple[str, str]]:
    sizes, length = ModelSizes.from_args(plan.args), plan.args.seq_length
    found = forward_parts(
        sizes, sizes.layer_kinds(), True, length, *pairs_of_layers(sizes, [length])
    )
    found["all"] = sum(found.values())
    passes = 1 + BACKWARD
    return [(part, f"{passes * n / length / 1e6:,.1f}") for part, n in found.items()]


def _time_rows(plan: Plan) -> list[tuple[str, str]]:
    time = plan.time
    parts = {
        "products of matrices": time.products,
        "attention": time.attention,
        "what lies between them": time.elementwise,
        "waiting for ranks of the replica": time.waiting,
        "idle ends of the pipeline": time.idle,
        "gradients and weights that nothing hides": time.data,
        "optimizer": time.optimizer,
        "step": time.step,
    }
    return [(part, f"{seconds:.3f}") for part, seconds in parts.items()]


def length_lines(plan: Plan) -> list[str]:
    """Speed, and what the run takes, or 10^12 tokens of it where its length is not given."""
    time = plan.time
    _, what = run_tokens(plan)
    days, hours = run_times(plan)
    return [
        f"{time.tokens_per_second:,.0f} tokens/s, MFU {100 * time.mfu:.1f} % of "
        f"{plan.goal.machine.bf16 / 1e12:g} TFLOP/s in bf16",
        f"{what}: {days:,.1f} days, {hours:,.0f} GPU-hours",
    ]


def run_tokens(plan: Plan) -> tuple[int, str]:
    """Tokens of the run, and how they are called."""
    args = plan.args
    if args.train_samples:
        tokens = int(args.train_samples * args.seq_length)
    elif any(flag.startswith("--train-iters") for flag in plan.flags):
        tokens = int(args.train_iters * plan.time.tokens)
    else:
        return 10**12, "10^12 tokens"
    return tokens, f"the run's {tokens:.4g} tokens"


def run_times(plan: Plan) -> tuple[float, float]:
    """Days of the run, and hours of all its GPUs."""
    tokens, _ = run_tokens(plan)
    hours = tokens / plan.time.tokens_per_second / HOURS
    return hours / 24, hours * plan.args.world_size


def print_beside(one: Plan, other: Plan, change: str) -> None:
    """Two plans side by side."""
    print_table(
        f"what if {change}",
        ("", "as planned", change),
        [
            (name, f"{a:.4g}", f"{b:.4g}")
            for (name, a), (_, b) in zip(_figures(one), _figures(other), strict=True)
        ],
    )
    print(f"with {change} it {'fits' if other.fits else 'does not fit'}")


def _figures(plan: Plan) -> list[tuple[str, float]]:
    fullest, time = plan.fullest, plan.time
    return [
        ("peak GB", fullest.peak / GB),
        ("weights, gradients, optimizer GB", (fullest.state.total + fullest.copies) / GB),
        ("kept GB", fullest.kept.total() / GB),
        ("working GB", fullest.working / GB),
        ("step s", time.step),
        ("tokens/s", time.tokens_per_second),
        ("MFU %", 100 * time.mfu),
        ("sent GB a step", sum(part.sent for part in plan.traffic()) / GB),
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that is printed, in bytes and seconds."""
    tokens, _ = run_tokens(plan)
    days, gpu_hours = run_times(plan)
    return {
        "command": command(plan),
        "fits": plan.fits,
        "gpu": asdict(plan.goal.machine),
        "assumed": asdict(plan.goal.assumed),
        "stages": [
            {
                "stage": stage.stage,
                "layers": [describe(chunk) for chunk in stage.chunks],
                "parameters": stage.parameters,
                **asdict(stage.state),
                "copies": stage.copies,
                "kept": dict(stage.kept),
                "working": stage.working,
                "peak": stage.peak,
                "moment": stage.moment,
            }
            for stage in plan.memory
        ],
        "traffic": [{**asdict(part), "sent": part.sent} for part in plan.traffic()],
        "time": {
            **asdict(plan.time),
            "step": plan.time.step,
            "tokens_per_second": plan.time.tokens_per_second,
            "mfu": plan.time.mfu,
        },
        "run": {"tokens": tokens, "days": days, "gpu_hours": gpu_hours},
    }
