"""What is watched while a run trains."""

from __future__ import annotations

import argparse
from argparse import Namespace
from importlib.util import find_spec

import torch

from megatron_trinity.arguments.refusal import Refusal


def add_monitoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`."""
    group = parser.add_argument_group(title="trinity monitoring")
    group.add_argument(
        "--run-dir",
        metavar="DIR",
        help="where the run keeps events.jsonl and arguments.yaml (default: that of --save, or "
        "else of --tensorboard-dir; without one there are none)",
    )
    group.add_argument(
        "--verbose-log",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="print what Megatron prints: each argument at start, and its lines of steps",
    )
    group.add_argument(
        "--alarm-window",
        type=int,
        default=100,
        metavar="STEPS",
        help="warn when an imbalance or a logit keeps climbing this long (default: %(default)s)",
    )
    group.add_argument(
        "--skip-nonfinite-steps",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N steps in a row whose loss or gradients are not finite, or not the "
        "same when the step is run again; one more ends the run (default: %(default)s)",
    )


def _misses_the_profile(args: Namespace) -> bool:
    """Whether the steps to profile are none, or end behind the last one."""
    start, end = args.profile_step_start, args.profile_step_end
    return not 0 <= start < end <= (args.train_iters or end)


MONITORING_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "alarm-window",
        lambda a: a.alarm_window < 20 or a.alarm_window % 4 != 0,
        "{--alarm-window=}: use a multiple of 4, 20 or more",
    ),
    Refusal(
        "skip-nonfinite-steps",
        lambda a: a.skip_nonfinite_steps < 0,
        "{--skip-nonfinite-steps=}: use 0 to end the run at the first one, or more",
    ),
    Refusal(
        "wandb-unused",
        lambda a: not a.wandb_project and (a.wandb_exp_name or a.wandb_save_dir or a.wandb_entity),
        "{--wandb-exp-name}, {--wandb-save-dir} and {--wandb-entity} are of a report to W&B; give "
        "{--wandb-project} as well",
    ),
    Refusal(
        "wandb-name",
        lambda a: a.wandb_project and not a.wandb_exp_name,
        "{--wandb-project} needs a name for the run; give {--wandb-exp-name}",
    ),
    Refusal(
        "wandb-directory",
        lambda a: a.wandb_project and not a.wandb_save_dir and not a.save,
        "{--wandb-project} keeps files in a folder; give {--wandb-save-dir} or {--save}",
    ),
    Refusal(
        "wandb-log",
        lambda a: a.wandb_project and not a.tensorboard_dir,
        "{--wandb-project}: Megatron reports there what it also writes for TensorBoard, and no "
        "loss without that; give {--tensorboard-dir} as well",
    ),
    Refusal(
        "wandb",
        lambda a: a.wandb_project and find_spec("wandb") is None,
        "{--wandb-project} needs the package wandb, which is not installed; use "
        'pip install ".[wandb]", or leave it out',
    ),
    Refusal(
        "profiler",
        lambda a: a.use_pytorch_profiler and not a.profile,
        "{--use-pytorch-profiler} says with what to profile, and nothing is profiled; use "
        "{--profile} as well, or leave it out",
    ),
    Refusal(
        "profile-of-cuda",
        lambda a: a.profile and not a.use_pytorch_profiler and not torch.cuda.is_available(),
        "{--profile} starts the profiler of CUDA, which this machine does not have; use "
        "{--use-pytorch-profiler} as well",
    ),
    Refusal(
        "profile-directory",
        lambda a: a.profile and a.use_pytorch_profiler and not a.tensorboard_dir,
        "{--profile} with {--use-pytorch-profiler} writes into the folder that "
        "{--tensorboard-dir} is in; give that",
    ),
    Refusal(
        "profile-steps",
        lambda a: a.profile and _misses_the_profile(a),
        "{--profile-step-start=} has to come before {--profile-step-end=}, and both within the "
        "{train_iters|the} iterations of the run; change one of them",
    ),
    Refusal(
        "profile-ranks",
        lambda a: a.profile and not all(0 <= rank < a.world_size for rank in a.profile_ranks),
        "{--profile-ranks=} are not all of this run; use 0 to one below {world_size|their number}",
    ),
    Refusal(
        "log-progress",
        lambda a: a.log_progress and not a.save,
        "{--log-progress} writes a file into the folder that {--save} names; give that, or leave "
        "it out",
    ),
    Refusal(
        "log-memory",
        lambda a: a.log_memory_interval is not None and a.log_memory_interval % a.log_interval != 0,
        "{--log-memory-interval=} is no multiple of {--log-interval=}; use a multiple",
    ),
)
