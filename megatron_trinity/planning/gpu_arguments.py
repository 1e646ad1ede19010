"""The trainer's arguments as it has them on a GPU, on a machine that need have none."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from megatron_trinity.errors import UsageError
from megatron_trinity.planning.fake_ranks import parse_for_ranks

LENGTHS = ("--train-iters", "--train-samples", "--train-tokens")
NO_LENGTH = ("--train-iters", "1000000")
OF_GPUS = ("--precision", "--transformer-impl")
ENGINE = "transformer_engine"


def parse_for_gpus(preset: str, world_size: int, flags: Sequence[str]) -> Namespace:
    """Parsed and checked, with the length of training where it is given.

    What a machine without CUDA would refuse for that alone, layers of Transformer Engine and FP8,
    is held to the refusals of those by themselves.

    Raises:
        UsageError: the trainer would refuse the arguments.
    """
    from megatron_trinity.arguments.kernels import KERNEL_REFUSALS
    from megatron_trinity.arguments.precision import (
        PRECISION_REFUSALS,
        PRECISIONS,
        TUNING,
        tune_precision,
    )
    from megatron_trinity.arguments.refusal import refuse

    given, others = _taken(flags)
    length = () if any(flag in LENGTHS for flag in flags) else NO_LENGTH
    fp8 = given.get("--precision", "").startswith("fp8")
    words = ["--bf16"] if fp8 else []
    if "--precision" in given and not fp8:
        words = ["--precision", given["--precision"]]
    args = parse_for_ranks(world_size, ["--preset", preset, *length, *words, *others])
    args.transformer_impl = given.get("--transformer-impl", ENGINE if fp8 else "local")
    if fp8:
        args.precision = given["--precision"]
        if args.precision not in PRECISIONS:
            raise UsageError(f"--precision {args.precision}: there are {', '.join(PRECISIONS)}")
        vars(args).update(PRECISIONS[args.precision].sets)
    for name in TUNING:  # filled in where it was not given
        if "--" + name.replace("_", "-") not in flags:
            setattr(args, name, None)
    refuse(args, (*KERNEL_REFUSALS, *PRECISION_REFUSALS))
    tune_precision(args)
    args.moe_grouped_gemm = args.transformer_impl == ENGINE
    args.bias_swiglu_fusion = True
    return args


def _taken(flags: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The flags that say what a GPU computes with, and all else."""
    given: dict[str, str] = {}
    others: list[str] = []
    words = iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        if name in OF_GPUS:
            given[name] = value if equals else next(words, "")
        else:
            others.append(word)
    return given, others
