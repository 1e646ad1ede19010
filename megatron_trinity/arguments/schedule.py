"""Length of training, batch ramps and learning-rate schedules, in tokens or in iterations."""

from __future__ import annotations

import argparse
from argparse import Namespace

from megatron_trinity.arguments.parallelism import data_ranks
from megatron_trinity.arguments.refusal import Refusal, refuse
from megatron_trinity.arguments.stages import STAGE_REFUSALS, settle_stages

TOKENS = {
    "train_tokens": "train_samples",
    "lr_decay_tokens": "lr_decay_samples",
    "lr_warmup_tokens": "lr_warmup_samples",
    "lr_wsd_decay_tokens": "lr_wsd_decay_samples",
    "lr_restart_tokens": "lr_restart_samples",
}
"""Our arguments in tokens, and the ones in samples that follow from them."""
SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def token_count(text: str) -> int:
    """A number of tokens such as `134217728` or `4.9T`.

    Raises: argparse.ArgumentTypeError, as an argument's type has to.
    """
    scale = SUFFIXES.get(text[-1:].upper(), 1)
    try:
        count = round(float(text[:-1] if scale > 1 else text) * scale)
    except (ValueError, OverflowError):
        count = 0
    if count <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, such as 500M or 4.9T")
    return count


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`."""
    group = parser.add_argument_group(title="trinity schedule")
    group.add_argument(
        "--train-tokens",
        type=token_count,
        metavar="N",
        help="length of training in tokens, as 500M or 17T; in place of --train-iters",
    )
    group.add_argument(
        "--lr-decay-tokens",
        type=token_count,
        metavar="N",
        help="when the learning rate has reached its minimum (default: --train-tokens)",
    )
    group.add_argument(
        "--lr-warmup-tokens", type=token_count, metavar="N", help="length of the warm-up"
    )
    group.add_argument(
        "--lr-wsd-decay-tokens",
        type=token_count,
        metavar="N",
        help="length of the last stage of --lr-decay-style WSD (default: a fifth of the schedule)",
    )
    group.add_argument(
        "--lr-restart-tokens",
        type=token_count,
        metavar="N",
        help="the schedule of the learning rate starts anew after so many tokens",
    )
    group.add_argument(
        "--lr-restart-iters",
        type=int,
        metavar="N",
        help="the same in iterations, with --train-iters",
    )


def derive_schedule(args: Namespace) -> None:
    """Turn what is given in tokens into samples, in place, and find where the schedule starts.

    Where training is counted in tokens and a preset gives a stage in iterations, it is as long as
    so many iterations of the first batch size.

    Raises:
        UsageError: lengths in tokens and in iterations that do not go together.
    """
    refuse(args, TOKEN_REFUSALS)
    args.lr_restart_samples = 0
    if args.step_batch_size_schedule is not None:
        # The ramp takes the place of the preset's batch size; Megatron wants one of them.
        args.global_batch_size = None
        args._is_global_batch_size_explicitly_specified = False
    if args.train_tokens is None:
        _derive_from_iterations(args)
        settle_stages(args)
        return
    for tokens, samples in TOKENS.items():
        count = getattr(args, tokens)
        if count is not None:
            setattr(args, samples, count // args.seq_length)
    first_batch = _first_batch(args)
    if args.lr_warmup_tokens is None and not args.lr_warmup_samples:
        args.lr_warmup_samples = args.lr_warmup_iters * first_batch
    if args.lr_wsd_decay_samples is None and args.lr_wsd_decay_iters is not None:
        args.lr_wsd_decay_samples = args.lr_wsd_decay_iters * first_batch
    args.lr_warmup_iters, args.lr_wsd_decay_iters = 0, None
    if args.lr_decay_samples is None:
        args.lr_decay_samples = args.train_samples - args.lr_restart_samples
    settle_stages(args)


def _derive_from_iterations(args: Namespace) -> None:
    if args.lr_restart_iters is not None:
        args.lr_restart_samples = args.lr_restart_iters * args.global_batch_size
        if args.lr_decay_iters is None:
            args.lr_decay_iters = args.train_iters - args.lr_restart_iters


def _first_batch(args: Namespace) -> int:
    """Sequences of the first global batch."""
    if args.step_batch_size_schedule is not None:
        _, _, batch = args.step_batch_size_schedule.replace(",", " ").split()[0].partition(":")
        return int(batch) if batch.isdigit() else 0  # Megatron refuses what is no number
    return int(args.global_batch_size or 0)


def _ramp_batches(args: Namespace) -> list[str]:
    """The batch sizes of a ramp, as they are written."""
    ramp = args.step_batch_size_schedule or ""
    return [entry.partition(":")[2] for entry in ramp.replace(",", " ").split()]


def _needs_train_tokens(dest: str) -> Refusal:
    flag = "--" + dest.replace("_", "-")
    return Refusal(
        flag.removeprefix("--"),
        lambda a: a.train_tokens is None and getattr(a, dest) is not None,
        f"{{{flag}}} needs {{--train-tokens}}",
    )


TOKEN_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "train-tokens",
        lambda a: (
            a.train_tokens is not None
            and (a.train_iters is not None or a.train_samples is not None)
        ),
        "{--train-tokens} beside {--train-iters} or {--train-samples}; give one of them",
    ),
    Refusal(
        "train-tokens-length",
        lambda a: a.train_tokens is not None and a.seq_length is None,
        "{--train-tokens} needs {--seq-length}",
    ),
    *(_needs_train_tokens(dest) for dest in TOKENS if dest != "train_tokens"),
    Refusal(
        "batch-ramp-iterations",
        lambda a: (
            a.train_tokens is None
            and a.step_batch_size_schedule is not None
            and a.train_iters is not None
        ),
        "{--step-batch-size-schedule} beside {--train-iters}: its thresholds are tokens; use "
        "{--train-tokens}",
    ),
    Refusal(
        "lr-restart-iters",
        lambda a: (
            a.train_tokens is None
            and a.lr_restart_iters is not None
            and (
                a.train_iters is None
                or a.global_batch_size is None
                or a.step_batch_size_schedule is not None
            )
        ),
        "{--lr-restart-iters} needs {--train-iters} and {--global-batch-size}",
    ),
)
"""Of lengths as they are given, before those in samples follow from them."""

SCHEDULE_REFUSALS: tuple[Refusal, ...] = (
    *STAGE_REFUSALS,
    Refusal(
        "batch-ramp",
        lambda a: any(
            batch.isdigit() and int(batch) % (a.micro_batch_size * data_ranks(a)) != 0
            for batch in _ramp_batches(a)
        ),
        "{--step-batch-size-schedule=}: a batch size is no multiple of {--micro-batch-size=} "
        "times the data-parallel ranks; change one of them",
    ),
)
