#!/usr/bin/env python3
"""Check a node before it trains: GPUs, their errors, NVLink, speed, disk, clock.

The exit code is 1 where something is bad. What cannot be looked at on a node is `not here`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_trinity.command_line.node.disk import disk_findings
from megatron_trinity.command_line.node.driver import driver_findings
from megatron_trinity.command_line.node.finding import BAD, NOT_HERE, Finding
from megatron_trinity.command_line.node.floors import read_floors
from megatron_trinity.command_line.node.kernel_log import xid_finding
from megatron_trinity.command_line.node.speed import speed_findings
from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.errors import run_command
from megatron_trinity.tables import print_table

EXAMPLE = """example:
  python tools/check_node.py --require-gpu --path runs --path /data
"""


def main() -> None:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--require-gpu", action="store_true", help="a part about GPUs that is not here is bad"
    )
    parser.add_argument(
        "--path",
        type=Path,
        action="append",
        metavar="DIR",
        help="of a disk that a run writes to, repeatable (default: the working directory)",
    )
    parser.add_argument("--floors", type=Path, metavar="FILE", help="what a node has to reach")
    parser.add_argument(
        "--quick", action="store_true", help="leave out what takes a device: product, all-reduce"
    )
    arguments = parser.parse_args()
    floors = read_floors(arguments.floors)

    findings = [*driver_findings(floors), xid_finding(floors)]
    for path in arguments.path or [Path()]:
        findings += disk_findings(path, floors)
    if not arguments.quick:
        findings += speed_findings(floors)
    print_table("node", ("", "", ""), [(one.subject, one.status, one.words) for one in findings])
    bad = [one for one in findings if is_bad(one, arguments.require_gpu)]
    for one in bad:
        print(f"bad: {one.subject}: {one.words}", file=sys.stderr)
    if bad:
        sys.exit(1)


def is_bad(finding: Finding, require_gpu: bool) -> bool:
    lacking = finding.status == NOT_HERE and finding.of_gpu
    return finding.status == BAD or (require_gpu and lacking)


if __name__ == "__main__":
    run_command(main)
