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
        "hang-minutes",
        lambda a: not a.hang_minutes >= 0,
        "{--hang-minutes=}: use 0 for no alarm, or more",
    ),
    Refusal(
        "exit-signal-handler",
        _is_megatrons,
        "{--exit-signal-handler}, {--exit-signal-handler-for-training} and "
        "{--exit-signal-handler-for-dataloader} are of no use: SIGTERM, SIGUSR1 and SIGINT "
        "save and end a run by default; leave them out, and give {--exit-signal} for one more",
    ),
)
