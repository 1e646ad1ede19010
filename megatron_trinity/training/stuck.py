"""Where a rank is stuck, and which ranks the others wait for."""

from __future__ import annotations

import faulthandler
import importlib
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

COLLECTIVES = "distributed_c10d.py"
"""File of torch that every collective of Python goes through."""

SHOWN = 8
"""Ranks that a line names."""


@dataclass(frozen=True)
class Stuck:
    """Where the main thread of a rank is.

    Attributes:
        rank: of the world.
        iteration: that is under way.
        collective: that it waits in, as far as Python knows; "" if in none.
        place: file, line and function of the innermost frame that is not torch's or Python's own.
    """

    rank: int
    iteration: int
    collective: str
    place: str

    def __str__(self) -> str:
        waits = f"waits in {self.collective}, " if self.collective else ""
        return f"rank {self.rank} {waits}at {self.place}"


def stuck_here(rank: int, iteration: int) -> Stuck:
    """Where the main thread is now; from any thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    collective, place = "", ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.endswith(COLLECTIVES):
            collective = frame.f_code.co_name
        elif not place and "/torch/" not in file and not file.startswith(sys.base_prefix):
            place = _place(frame)
        frame = frame.f_back
    return Stuck(rank, iteration, collective, place)


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"


def behind(records: Mapping[int, Stuck], silent: Mapping[int, str]) -> str:
    """In words, the ranks that the others wait for.

    Args:
        records: of the ranks that have said where they are.
        silent: rank to process, of those that have not.
    """
    if silent:
        named = [f"rank {rank} ({silent[rank]})" for rank in sorted(silent)]
        return f"no sign of life from {_listed(named)}"
    least = min(record.iteration for record in records.values())
    found = [record for record in records.values() if record.iteration == least]
    if len(found) == len(records):
        found = [record for record in records.values() if not record.collective] or found
    if len(found) == len(records) > 1:
        return f"no rank is behind: {_listed([str(record) for record in found])}"
    return f"the others wait for {_listed([str(record) for record in found])}"


def _listed(named: list[str]) -> str:
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return ", ".join(named[:SHOWN]) + more


def write_stacks(folder: Path | None, rank: int) -> str:
    """Write the stacks of all threads, and torch's record of collectives where it has one.

    Returns: where, in words; the standard error of each rank if there is no folder.
    """
    if folder is None:
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        return "the output of each rank"
    with suppress(OSError):
        (folder / "hang").mkdir(parents=True, exist_ok=True)
        with open(folder / "hang" / f"rank-{rank}.txt", "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if (trace := _flight_record()) is not None:
            (folder / "hang" / f"rank-{rank}.flight").write_bytes(trace)
    return str(folder / "hang")


def _flight_record() -> bytes | None:
    """Torch's record of the last collectives of NCCL, for `torchfrtrace`; None without one."""
    with suppress(Exception):
        module: Any = importlib.import_module("torch._C._distributed_c10d")
        trace: bytes = module._dump_nccl_trace()
        return trace
    return None
