"""One process at a time holds a directory: kills, stops, other hosts, and races of several."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from megatron_trinity.checkpoint.iterations import iterations
from megatron_trinity.checkpoint.whole import hold, owner
from megatron_trinity.checkpoint.whole.candidates import is_empty, sweep
from megatron_trinity.checkpoint.whole.hold import holding
from megatron_trinity.errors import TrinityError

LIMIT = 60.0
BEAT, SILENCE = 0.1, 1.0
FORK = multiprocessing.get_context("fork")


def _hold(pipe: Connection, run: Path, machine: str, wait: bool, go: Event, stay: float) -> None:
    if machine != "here":
        owner._machine = lambda: machine
    go.wait(LIMIT)
    try:
        with holding(run, wait, SILENCE, pipe.send, BEAT) as held:
            pipe.send("held")
            _note(run, "in")
            end = time.monotonic() + stay
            while time.monotonic() < end:
                time.sleep(0.02)
                held.check(look=False)
            _note(run, "out")
            pipe.send("done")
    except TrinityError as error:
        pipe.send(str(error))


def _note(run: Path, what: str) -> None:
    with open(run.with_name("turns"), "a") as file:
        file.write(f"{what} {os.getpid()}\n")


def turns(run: Path) -> list[str]:
    """When which process began to hold, and ended it by itself."""
    file = run.with_name("turns")
    return file.read_text().splitlines() if file.exists() else []


class Process:
    """A process that holds a directory for `stay` seconds, and what it says."""

    def __init__(self, run: Path, machine: str, wait: bool, go: Event, stay: float) -> None:
        self.pipe, theirs = FORK.Pipe(duplex=False)
        arguments = (theirs, run, machine, wait, go, stay)
        self._process = FORK.Process(target=_hold, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def line(self) -> str:
        assert self.pipe.poll(LIMIT)
        return str(self.pipe.recv())

    def lines(self) -> list[str]:
        """All to the end of the process."""
        said = []
        try:
            while True:
                said.append(self.line())
        except EOFError:
            return said

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it, if it has not ended, and reap it."""
        self._process.kill()
        self._process.join()


Start = Callable[..., Process]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def start(run: Path) -> Iterator[Start]:
    """Starts a process that holds `run`, here or on another machine."""
    processes: list[Process] = []
    at_once = FORK.Event()
    at_once.set()

    def begin(
        machine: str = "here", wait: bool = False, go: Event = at_once, stay: float = LIMIT
    ) -> Process:
        processes.append(Process(run, machine, wait, go, stay))
        return processes[-1]

    yield begin
    for process in processes:
        process.end()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "POLL", 0.02)


def take(run: Path, wait: bool = False) -> list[str]:
    """Hold for a moment; returns what was said."""
    said: list[str] = []
    with holding(run, wait, SILENCE, said.append, BEAT):
        [file] = run.glob(".held_*")
        assert json.loads(file.read_text())["pid"] == os.getpid()
    return said


def test_a_live_holder_is_named(start: Start, run: Path) -> None:
    process = start()
    assert process.line() == "held"
    [file] = run.iterdir()
    host = json.loads(file.read_text())["host"]
    pattern = (
        rf"{run} is in use: it is held by process {process.pid} on {host} since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC; wait for its end, .* or give another --save"
    )
    with pytest.raises(TrinityError) as refused:
        take(run)
    assert re.fullmatch(pattern, str(refused.value))
    # Here it is known that it lives, however silent it is.
    process.send(signal.SIGSTOP)
    time.sleep(1.5 * SILENCE)
    with pytest.raises(TrinityError, match="is in use"):
        take(run)
    assert list(run.iterdir()) == [file]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_holder_that_was_killed_here_is_followed_at_once(
    start: Start, run: Path, sent: signal.Signals
) -> None:
    process = start()
    assert process.line() == "held"
    process.send(sent)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # nobody has reaped it
    began = time.monotonic()
    [line] = take(run)
    assert time.monotonic() - began < SILENCE
    assert f"was held by process {process.pid} on " in line
    assert line.endswith(", which has ended: it is taken over")
    assert list(run.iterdir()) == []
    assert take(run) == []


def _left(run: Path, **changes: str) -> Path:
    """What this process would leave if it were killed, with other contents."""
    with holding(run):
        [file] = run.iterdir()
        content = {**json.loads(file.read_text()), **changes}
    run.mkdir()
    file.write_text(json.dumps(content))
    return file


def test_a_later_process_with_the_number_of_the_holder_is_not_it(run: Path) -> None:
    file = _left(run)
    with pytest.raises(TrinityError, match=f"held by process {os.getpid()} on"):
        take(run)
    file.unlink()
    run.rmdir()
    _left(run, started="1")
    [line] = take(run)
    assert line.endswith("which has ended: it is taken over")


def test_a_holder_of_another_machine_that_lives_is_left_alone(start: Start, run: Path) -> None:
    process = start("moon")
    assert process.line() == "held"
    said: list[str] = []
    began = time.monotonic()
    with (
        pytest.raises(TrinityError, match=f"is in use: it is held by process {process.pid} on"),
        holding(run, silence=LIMIT, say=said.append),
    ):
        pass
    assert time.monotonic() - began < LIMIT / 2
    [line] = said
    assert line.endswith(": waiting 60 s for a sign of life")


def test_a_holder_of_another_machine_is_followed_after_a_silence(start: Start, run: Path) -> None:
    """It was stopped; when it goes on it finds that it is not the holder any more."""
    process = start("moon")
    assert process.line() == "held"
    process.send(signal.SIGSTOP)
    began = time.monotonic()
    said: list[str] = []
    with holding(run, False, SILENCE, said.append, BEAT) as held:
        assert time.monotonic() - began >= SILENCE
        assert said[-1].endswith(f", silent for {SILENCE:g} s: it is taken over")
        process.send(signal.SIGCONT)
        line = process.line()
        assert line.startswith(f"{run} is not held by this run any more: taken over by process ")
        assert f"process {os.getpid()} on " in line
        assert process.lines() == []
        held.check()
        assert len(list(run.iterdir())) == 1


def test_a_holder_that_went_on_too_late_finds_nothing_or_another(start: Start, run: Path) -> None:
    """The one that took over has ended, and the files have the numbers that they had."""
    process = start("moon")
    assert process.line() == "held"
    process.send(signal.SIGSTOP)
    assert "silent" in take(run)[-1]
    with holding(run) as held:
        assert [path.name for path in run.iterdir()] == [".held_1"]
        process.send(signal.SIGCONT)
        assert f"taken over by process {os.getpid()} on" in process.line()
        assert process.lines() == []
        held.check()


def test_a_holder_whose_file_is_deleted_ends(run: Path) -> None:
    with holding(run) as held:
        held.check()
        (run / ".held_1").unlink()
        with pytest.raises(TrinityError, match=r": \.held_1 in it was deleted; this one writes"):
            held.check()
        with pytest.raises(TrinityError):
            held.check(look=False)


def test_clocks_do_not_count(run: Path) -> None:
    """Neither times of files nor those in contents are compared with anything."""
    os.utime(_left(run, machine="moon", since="1970-01-01 00:00:00 UTC"), (0, 0))
    began = time.monotonic()
    waited, taken = take(run)
    assert time.monotonic() - began >= SILENCE
    assert waited.endswith("since 1970-01-01 00:00:00 UTC: waiting 1 s for a sign of life")
    assert taken.endswith("since 1970-01-01 00:00:00 UTC, silent for 1 s: it is taken over")


def test_a_file_without_a_name_is_followed_after_a_silence(run: Path) -> None:
    """Its process was killed before it could write it."""
    run.mkdir()
    (run / ".held_3").touch()
    assert take(run)[-1].startswith(f"{run} was held by a process that left no name, silent for")
    assert list(run.iterdir()) == []


def test_one_that_waits_goes_on_when_the_holder_is_done(start: Start, run: Path) -> None:
    process = start(stay=0.5)
    assert process.line() == "held"
    [line] = take(run, wait=True)
    assert process.line() == "done"
    assert line.endswith(": waiting for its end")


def test_one_that_waits_for_another_machine_does_not_take_over(start: Start, run: Path) -> None:
    """However long it waits, it is from the newest sign of life on."""
    process = start("moon", stay=2.5 * SILENCE)
    assert process.line() == "held"
    looking, waiting = take(run, wait=True)
    assert process.line() == "done"
    assert looking.endswith(": waiting 1 s for a sign of life")
    assert waiting.endswith(": waiting for its end")


@pytest.mark.parametrize("machine", ["here", "moon"])
def test_of_several_that_take_over_one_wins(start: Start, run: Path, machine: str) -> None:
    first, go = start(machine), FORK.Event()
    assert first.line() == "held"
    first.send(signal.SIGKILL)
    followers = [start(go=go, stay=2 * SILENCE) for _ in range(8)]
    go.set()
    outcomes = [follower.lines() for follower in followers]
    [winner] = [lines for lines in outcomes if "held" in lines]
    assert winner[-1] == "done"
    assert winner[-3].endswith("it is taken over")
    assert sum("is in use" in lines[-1] for lines in outcomes) == len(followers) - 1
    assert sum("taken over" in line for lines in outcomes for line in lines) == 1


@pytest.mark.parametrize(
    ("there", "number", "content"),
    [
        ({1: b"a", 2: b"b"}, 1, b"a"),  # another was faster
        ({2: b"b"}, 0, b""),  # another was there, and not seen
        ({1: b"b"}, 1, b"a"),  # it gave a sign of life
        ({}, 1, b"a"),  # it was released
        ({3: b"c"}, 1, b"a"),  # it was followed, twice
    ],
)
def test_what_is_outdated_is_not_followed(
    run: Path, there: dict[int, bytes], number: int, content: bytes
) -> None:
    run.mkdir()
    for other, text in there.items():
        (run / f".held_{other}").write_bytes(text)
    assert hold._follow(run, number, content, BEAT) is None
    assert {int(p.name[6:]): p.read_bytes() for p in run.iterdir()} == there


def test_what_was_followed_is_deleted(run: Path) -> None:
    """That of the holder, and what one who followed before could not delete."""
    run.mkdir()
    for number in (1, 2, 10):
        (run / f".held_{number}").write_bytes(b"a")
    held = hold._follow(run, 10, b"a", BEAT)
    assert held is not None
    assert [path.name for path in run.iterdir()] == [".held_11"]
    held.release()


@pytest.mark.parametrize("seed", range(2))
def test_they_take_turns_whoever_is_killed(start: Start, run: Path, seed: int) -> None:
    """Of twelve that wait five are killed, holding or not; no two of them hold it at once."""
    dice, go = random.Random(seed), FORK.Event()
    waiting = {p.pid: p for p in [start(wait=True, go=go, stay=0.1) for _ in range(12)]}
    go.set()
    killed: set[int] = set()
    while len(killed) < 5:
        time.sleep(dice.uniform(0, 0.1))
        holder = int(turns(run)[-1].split()[1]) if turns(run) else 0
        victim = holder if dice.random() < 0.6 else dice.choice(list(waiting))
        if victim in waiting:
            waiting.pop(victim).send(signal.SIGKILL)
            killed.add(victim)
    for process in waiting.values():
        assert process.lines()[-1] == "done"
    seen = turns(run)
    for turn, following in zip(seen, [*seen[1:], ""], strict=True):
        what, pid = turn.split()
        assert what == "out" or following == f"out {pid}" or int(pid) in killed
    assert {int(turn.split()[1]) for turn in seen if turn.startswith("out")} >= set(waiting)
    assert len(take(run)) <= 1


def test_a_directory_that_goes_meanwhile(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before has made it, and deletes it where it is empty when it ends."""
    made, mkdir = [], os.mkdir

    def make_and_lose(path: Any, *arguments: Any, **options: Any) -> None:
        made.append(path)
        if len(made) == 1:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", make_and_lose)
    with holding(run) as held:
        held.check()
    assert len(made) == 2


def test_files_of_holders_are_no_checkpoints(run: Path) -> None:
    """A directory with nothing else in it is empty, and is not there any more afterwards."""
    with holding(run) as held:
        assert is_empty(run)
        assert iterations(run) == []
        sweep(run)
        held.check()
    assert not run.exists()
    (run / "iter_0000001").mkdir(parents=True)
    with holding(run):
        assert iterations(run) == [run / "iter_0000001"]
    assert list(run.iterdir()) == [run / "iter_0000001"]


def test_a_directory_that_cannot_be_written(run: Path) -> None:
    run.touch()
    with pytest.raises(TrinityError, match=f"^cannot write into {run}: Not a directory$"):
        take(run)
