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


MONITORING_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "alarm-window",
        lambda a: a.alarm_window < 20 or a.alarm_window % 4 != 0,
        "{--alarm-window=}: use a multiple of 4, 20 or more",
    ),
)
