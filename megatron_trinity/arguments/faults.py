"""What a run does when it is told to stop, when no step comes, and which ranks are slow."""

from __future__ import annotations

import argparse
from argparse import Namespace

from megatron_trinity.arguments.refusal import Refusal


def add_fault_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`."""
    group = parser.add_argument_group(title="trinity faults")
    group.add_argument(
        "--exit-within",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="told to stop, the run leaves within this time, saved or not (default: %(default)s)",
    )
    group.add_argument(
        "--hang-minutes",
        type=float,
        default=3.0,
        metavar="MINUTES",
        help="end the run when a step takes longer; ten times as long for the first step and for "
        "what is between two, such as a save; 0 for never (default: %(default)s)",
    )
    group.add_argument(
        "--spike-factor",
        type=float,
        default=0.0,
        metavar="F",
        help="a step is a spike if its loss or its gradient norm is above F times the median of "
        "the steps before it; 0 for none (default: %(default)s)",
    )
    group.add_argument(
        "--spike-action",
        choices=("warn", "skip", "rewind"),
        default="warn",
        help="warn alone; or do not apply the step; or end with exit "
        "code 5, and leave its data out from the last checkpoint on (default: %(default)s)",
    )
    group.add_argument(
        "--spike-window",
        type=int,
        default=100,
        metavar="STEPS",
        help="how many steps a median is of (default: %(default)s)",
    )
    group.add_argument(
        "--spike-skips",
        type=int,
        default=3,
        metavar="N",
        help="leave out up to N spikes in a row; one more ends the run (default: %(default)s)",
    )
    group.add_argument(
        "--straggler-interval",
        type=int,
        default=0,
        metavar="STEPS",
        help="compare the time that each rank needs for a step by itself, without its waits for "
        "others, and name the slowest one; 0 for never (default: %(default)s)",
    )


def _is_megatrons(args: Namespace) -> object:
    return (
        args.exit_signal_handler
        or args.exit_signal_handler_for_training
        or args.exit_signal_handler_for_dataloader
    )


FAULT_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "exit-within",
        lambda a: not a.exit_within > 0,
        "{--exit-within=}: use more than 0 seconds, enough for a step and a save",
    ),
    Refusal(
        "spike-factor",
        lambda a: not (a.spike_factor == 0 or a.spike_factor > 1),
        "{--spike-factor=}: use more than 1, such as 3, or 0 for none",
    ),
    Refusal(
        "spike-action",
        lambda a: a.spike_action != "warn" and not a.spike_factor,
        "{--spike-action=} does not say what a spike is; give {--spike-factor} as well",
    ),
    Refusal(
        "spike-rewind",
        lambda a: a.spike_action == "rewind" and not (a.save and a.save == a.load),
        "{--spike-action} rewind goes back to a checkpoint; give one folder as {--save} and "
        "{--load}",
    ),
    Refusal(
        "spike-window",
        lambda a: a.spike_window < 4,
        "{--spike-window=}: use 4 steps or more",
    ),
    Refusal(
        "spike-skips",
        lambda a: a.spike_skips < 1,
        "{--spike-skips=}: use 1 or more",
    ),
    Refusal(
        "hang-minutes",
        lambda a: not a.hang_minutes >= 0,
        "{--hang-minutes=}: use 0 for no alarm, or more",
    ),
    Refusal(
        "exit-signal-handler",
        _is_megatrons,
        "{--exit-signal-handler}, {--exit-signal-handler-for-training} and "
        "{--exit-signal-handler-for-dataloader} are not needed, since SIGTERM, SIGUSR1 and SIGINT "
        "save and end a run by default; leave them out, and give {--exit-signal} for one more",
    ),
)
