"""Checkpoints: their flags, and what of Megatron's is refused."""

from __future__ import annotations

import argparse
from argparse import Namespace

from megatron_trinity.arguments.refusal import Refusal


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`."""
    group = parser.add_argument_group(title="trinity checkpoints")
    group.add_argument(
        "--keep-last-checkpoints",
        type=int,
        metavar="K",
        help="after a save, delete all but the K newest checkpoints (default: keep all)",
    )
    group.add_argument(
        "--keep-every-iterations",
        type=int,
        metavar="N",
        help="of those, keep the checkpoints whose iteration is a multiple of N",
    )
    group.add_argument(
        "--extend-context",
        action="store_true",
        help="go on from a checkpoint of another --seq-length, optimizer included",
    )
    group.add_argument(
        "--verify-checkpoint",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="before loading, read every file and compare its checksum; without, names and "
        "sizes are compared alone (default: %(default)s)",
    )
    group.add_argument(
        "--save-in-use",
        choices=("end", "wait"),
        default="end",
        help="what to do where another run holds --save (default: %(default)s)",
    )
    group.add_argument(
        "--save-silence",
        type=float,
        default=180.0,
        metavar="SECONDS",
        help="without a sign of life from a run on another host, before --save is taken over from "
        "it (default: %(default)s)",
    )


def _below_1(number: int | None) -> bool:
    return number is not None and number < 1


def _misses_saves(args: Namespace) -> bool:
    every, interval = args.keep_every_iterations, args.save_interval
    return bool(every and interval and every % interval != 0)


LEAST_SILENCE = 60
"""Seconds: hosts that share a file system may see what another has written so much later."""

FORMATS = ("torch_dist", "torch")
"""Of Megatron's formats those whose checkpoints are whole or nothing."""

SAVE_INTERVALS = (
    "save_interval",
    "save_params_interval",
    "save_wgrads_interval",
    "save_tokens_per_expert_interval",
)
"""Arguments that say when something is saved to `--save`."""

CHECKPOINT_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "checkpoint-format",
        lambda a: a.ckpt_format not in FORMATS,
        "{--ckpt-format=} makes checkpoints that nothing verifies; use torch_dist, which any "
        "layout loads, and {--use-distributed-optimizer} in place of FSDP",
    ),
    Refusal(
        "save-interval",
        lambda a: a.save and a.save_interval is None,
        "{--save} does not say when; give {--save-interval} as well, the iterations from one "
        "checkpoint to the next",
    ),
    Refusal(
        "save",
        lambda a: not a.save and any(getattr(a, interval) for interval in SAVE_INTERVALS),
        "{--save-interval}, {--save-params-interval}, {--save-wgrads-interval} and "
        "{--save-tokens-per-expert-interval} save nothing where it is not said; give {--save}",
    ),
    Refusal(
        "keep-numbers",
        lambda a: _below_1(a.keep_last_checkpoints) or _below_1(a.keep_every_iterations),
        "{--keep-last-checkpoints} and {--keep-every-iterations} must be 1 or more; leave them "
        "out to keep every checkpoint",
    ),
    Refusal(
        "keep-every",
        _misses_saves,
        "{--keep-every-iterations=} is no multiple of {--save-interval=}, so it would keep few "
        "or none; use a multiple",
    ),
    Refusal(
        "save-silence",
        lambda a: not a.save_silence >= LEAST_SILENCE,
        "{--save-silence=} is less than 60 seconds, in which a shared file system may keep a sign "
        "of life back; use 60 or more",
    ),
    Refusal(
        "retain-interval",
        lambda a: a.save_retain_interval is not None,
        "{--save-retain-interval} deletes without looking whether a newer checkpoint is whole; "
        "use {--keep-every-iterations}",
    ),
    Refusal(
        "non-persistent",
        lambda a: a.non_persistent_ckpt_type or a.non_persistent_save_interval,
        "{--non-persistent-ckpt-type} and {--non-persistent-save-interval} make checkpoints that "
        "nothing verifies; use {--save-interval} with {--keep-last-checkpoints}",
    ),
    Refusal(
        "convert-format",
        lambda a: a.ckpt_convert_format,
        "{--ckpt-convert-format} makes checkpoints that nothing verifies, from a run that does "
        "not train; leave it out, and use {--ckpt-format} torch_dist, which any layout loads",
    ),
    Refusal(
        "integrity",
        lambda a: a.verify_integrity,
        "{--verify-integrity} has rank 0 read every checkpoint again; each has a manifest with "
        "checksums already, leave it out",
    ),
    Refusal(
        "storage-client",
        lambda a: a.enable_msc,
        "{--enable-msc} reads and writes object stores, where checkpoints cannot be replaced in "
        "one step; use a file system",
    ),
    Refusal(
        "async-format",
        lambda a: a.async_save and a.ckpt_format != "torch_dist",
        "{--async-save} is proved for {--ckpt-format} torch_dist alone; use that in place of "
        "{ckpt_format|another}",
    ),
    Refusal(
        "async-strategy",
        lambda a: a.async_save and a.async_strategy != "mcore",
        "{--async-strategy=} needs nvidia-resiliency-ext, whose writer leaves no checksums; use "
        "mcore",
    ),
    Refusal(
        "async-worker",
        lambda a: a.async_save and not a.use_persistent_ckpt_worker,
        "{--async-save} would be turned off by Megatron without {--use-persistent-ckpt-worker}; "
        "use that as well",
    ),
    Refusal(
        "checkpoint-args",
        lambda a: a.use_checkpoint_args,
        "{--use-checkpoint-args} is not supported; give the preset and flags that the run had",
    ),
)
