"""What is watched while a run trains."""

from __future__ import annotations

import argparse

from megatron_trinity.arguments.refusal import Refusal


def add_monitoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`."""
    group = parser.add_argument_group(title="trinity monitoring")
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
)
