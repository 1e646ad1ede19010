"""The faults of chaos: what is done to a run, and what may come of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megatron_trinity import exits
from megatron_trinity.checkpoint.iterations import newest_saved
from tests.checkpoints import flip_bit
from tests.stress.launches import IN_JOB, SCRIPT, TORCHRUN, Launch

ALL = (TORCHRUN, IN_JOB, SCRIPT)


@dataclass(frozen=True)
class Fault:
    """What can happen to a run.

    Attributes:
        name: in tables.
        happen: makes it happen to a launch.
        saved: whether the run has to save all that it has done.
        codes: what ranks may end with; of those that say so.
        under: what may have started the run, which then starts again by itself or is started again.
        early: whether it may come before the first step.
        then: happens to the run's directory when the launch has ended.
        ends_launcher: whether no launcher starts the run again behind it.
    """

    name: str
    happen: Callable[[Launch, Path, Random], None]
    saved: bool
    codes: frozenset[int]
    under: tuple[str, ...] = (TORCHRUN,)
    early: bool = True
    then: Callable[[Path, Random], None] | None = None
    ends_launcher: bool = False


def a_rank(launch: Launch, chance: Random) -> int:
    pids = launch.pids()
    return pids[chance.choice(sorted(pids))]


def kill_a_rank(launch: Launch, _: Path, chance: Random) -> None:
    os.kill(a_rank(launch, chance), signal.SIGKILL)


def kill_torchrun(launch: Launch, _: Path, __: Random) -> None:
    os.kill(launch.torchrun(), signal.SIGKILL)


def suspend_a_rank(launch: Launch, _: Path, chance: Random) -> None:
    os.kill(a_rank(launch, chance), signal.SIGSTOP)


def tell_all(number: int) -> Callable[[Launch, Path, Random], None]:
    def tell(launch: Launch, _: Path, __: Random) -> None:
        os.kill(launch.pid, number)

    return tell


def tell_one(launch: Launch, _: Path, chance: Random) -> None:
    number = chance.choice(SIGNALS)
    os.kill(a_rank(launch, chance), number)


def be_nonfinite(launch: Launch, _: Path, chance: Random) -> None:
    fault = {
        "rank": chance.choice(sorted(launch.pids())),
        "where": chance.choice(["attention", "gradient", "loss"]),
    }
    new = launch.folder / "nonfinite.new"
    new.write_text(json.dumps(fault))
    new.rename(launch.folder / "nonfinite")


FILLER = "filler"


def fill_the_disk(_: Launch, run: Path, __: Random) -> None:
    with open(run.parent / FILLER, "ab", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(1 << 16))  # the last one is cut


def empty_the_disk(run: Path, _: Random) -> None:
    (run.parent / FILLER).unlink()


def damage_the_newest(run: Path, chance: Random) -> None:
    newest = newest_saved(run)
    assert newest is not None
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    file = chance.choice(files)
    how = chance.choice(["flip", "truncate", "delete"])
    if how == "flip":
        flip_bit(file)
    elif how == "truncate":
        os.truncate(file, chance.randrange(file.stat().st_size))
    else:
        file.unlink()


def ends(*codes: int) -> frozenset[int]:
    """What ranks end with; those that torchrun ends, when one has, with SIGTERM or its code."""
    return frozenset({*codes, -signal.SIGTERM, exits.of_signal(signal.SIGTERM)})


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
KILLED = -signal.SIGKILL
NO_SCRIPT = (TORCHRUN, IN_JOB)

FAULTS = (
    Fault("kill -9 of a rank", kill_a_rank, False, ends(KILLED, exits.PEER_LOST), ALL),
    Fault(
        "kill -9 of torchrun", kill_torchrun, True, ends(exits.LAUNCHER_LOST), (TORCHRUN, SCRIPT)
    ),
    Fault("SIGTERM", tell_all(signal.SIGTERM), True, ends(), ALL, ends_launcher=True),
    *(
        Fault(number.name, tell_all(number), True, ends(exits.of_signal(number)))
        for number in SIGNALS[1:]
    ),
    Fault("a signal to one rank", tell_one, True, ends(*map(exits.of_signal, SIGNALS))),
    Fault(
        "a suspended rank",
        suspend_a_rank,
        False,
        ends(KILLED, exits.HUNG, exits.PEER_LOST),
        ALL,
        early=False,
    ),
    Fault(
        "a full disk", fill_the_disk, False, ends(exits.FAILED), early=False, then=empty_the_disk
    ),
    Fault("a step that is not finite", be_nonfinite, False, ends(exits.BAD_STEP), NO_SCRIPT, False),
    Fault(
        "a damaged checkpoint",
        tell_all(signal.SIGTERM),
        True,
        ends(),
        early=False,
        then=damage_the_newest,
    ),
)
