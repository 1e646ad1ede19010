"""Who may write into a directory of checkpoints: one process at a time, of whatever host.

The holder is the file `.held_N` with the largest N. Its content names a process, and counts on as
long as that lives. To follow a holder that is gone is to create `.held_N+1` exclusively, which of
several succeeds for one alone, over NFS too; what it replaces is deleted afterwards.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from megatron_trinity.checkpoint.whole.owner import Owner, this_process
from megatron_trinity.errors import TrinityError

SILENCE = 180.0
"""Seconds without a sign of life after which a process of another host counts as gone."""

BEAT, POLL = 10.0, 0.5
"""Seconds between two signs of life, and between two looks for those of another."""

_NAME = re.compile(r"\.held_(\d+)")


class Hold:
    """The right to write into a directory, until it is released or taken.

    Args:
        path: the file that this process has created and opened as `descriptor`.
        owner: this process, as the file has it.
        beat: seconds between two signs of life.
    """

    def __init__(self, path: Path, descriptor: int, owner: Owner, beat: float) -> None:
        self._path, self._descriptor, self._owner, self._beat = path, descriptor, owner, beat
        self._beats = 0
        self._taken: str | None = None
        self._one_at_a_time, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="hold", daemon=True)
        self._thread.start()

    def check(self, look: bool = True) -> None:
        """Refuse to go on without it.

        Args:
            look: at the disk now; else what the last sign of life has found counts.

        Raises:
            TrinityError: another process has taken over, or the file was deleted.
        """
        if look:
            self._sign()
        if self._taken is not None:
            raise TrinityError(
                f"{self._path.parent} is not held by this run any more: {self._taken}; this one "
                "writes nothing more"
            )

    def release(self) -> None:
        """Let the next one in."""
        self._ended.set()
        self._thread.join(self._beat)
        if not self._thread.is_alive():  # else it may still write
            os.close(self._descriptor)
        with suppress(OSError):
            if _owner(self._path.read_bytes()) == self._owner:
                self._path.unlink()

    def _live(self) -> None:
        while self._taken is None and not self._ended.wait(self._beat):
            self._sign()

    def _sign(self) -> None:
        with self._one_at_a_time:
            if self._ended.is_set():
                return
            self._beats += 1
            with suppress(OSError):  # of a file that is gone, or the next one will succeed
                _write(self._descriptor, self._owner, self._beats)
            with suppress(OSError):
                self._taken = self._taken or self._taker()

    def _taker(self) -> str | None:
        number, content = _newest(self._path.parent)
        owner = _owner(content)
        if owner == self._owner:
            return None
        if number == 0 or (owner is None and number == _number(self._path)):
            return f"{self._path.name} in it was deleted"
        return f"taken over by {owner or 'another process'}"


@contextmanager
def holding(
    directory: Path,
    wait: bool = False,
    silence: float = SILENCE,
    say: Callable[[str], None] = print,
    beat: float = BEAT,
) -> Iterator[Hold]:
    """Hold `directory`, which is made if it is not there, and goes again if it stays empty.

    Args:
        wait: for the end of a process that holds it.
        silence: seconds for which the file of a process of another machine has to be seen unchanged
            before it is taken over from. Clocks are not compared.
        say: is told what it waits for, and from whom it takes over, a line each.
        beat: seconds between two signs of life.

    Raises:
        TrinityError: a process holds it and lives, or it cannot be written.
    """
    is_new = not directory.exists()
    try:
        held = _take(directory, wait, silence, say, beat)
    except OSError as error:
        is_full = error.errno == errno.ENOSPC
        why = f"the disk of {directory} is full" if is_full else error.strerror
        raise TrinityError(f"cannot write into {directory}: {why}") from error
    try:
        yield held
    finally:
        held.release()
        if is_new:
            with suppress(OSError):
                directory.rmdir()


def _take(
    directory: Path, wait: bool, silence: float, say: Callable[[str], None], beat: float
) -> Hold:
    seen, since, told = (-1, b""), time.monotonic(), ""
    while True:
        before, seen = seen, _newest(directory)
        number, content = seen
        # One that is not known is about to write its name, or has ended before it did.
        owner = _owner(content)
        who = owner or "a process that left no name"
        if seen != before:
            since = time.monotonic()
        here = owner is not None and owner.is_here()
        lives = owner is not None and owner.is_running() if here else seen != before
        why = line = ""
        if here and not lives:
            why = "which has ended"
        elif not here and time.monotonic() - since > silence:
            why = f"silent for {silence:g} s"
        if number == 0 or why:
            # The one before may have deleted it, or does so now: `mkdir` looks once more at what it
            # has found, and calls it no directory if it is gone. The next look is as good.
            with suppress(FileExistsError):
                directory.mkdir(parents=True, exist_ok=True)
            if (held := _follow(directory, number, content, beat)) is not None:
                if why:
                    say(f"{directory} was held by {who}, {why}: it is taken over")
                return held
        elif here or (lives and owner is not None and owner == _owner(before[1])):
            if not wait:
                raise TrinityError(
                    f"{directory} is in use: it is held by {who}; wait for its end, as training "
                    "does with --save-in-use wait, or give another --save"
                )
            line = f"{directory} is held by {who}: waiting for its end"
        elif not told:
            line = f"{directory} is held by {who}: waiting {silence:g} s for a sign of life"
        if line and line != told:
            say(told := line)
        time.sleep(POLL)


def _follow(directory: Path, number: int, content: bytes, beat: float) -> Hold | None:
    """Follow the holder `number`, which has `content`; 0: nobody. None if another was faster."""
    path, owner = directory / f".held_{number + 1}", this_process()
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    except (FileExistsError, FileNotFoundError):
        return None
    try:
        _write(descriptor, owner, 0)
        # What was read before may have been outdated, by a cache of NFS above all.
        others = {_number(other): other for other in _files(directory) if other != path}
        is_next = max(others, default=0) == number
        if is_next and (number == 0 or others[number].read_bytes() == content):
            for other in others.values():
                other.unlink(missing_ok=True)
            return Hold(path, descriptor, owner, beat)
    except OSError as error:
        _withdraw(path, descriptor)
        if not _is_missing(error):
            raise
        return None
    _withdraw(path, descriptor)
    return None


def _withdraw(path: Path, descriptor: int) -> None:
    os.close(descriptor)
    path.unlink(missing_ok=True)


def _write(descriptor: int, owner: Owner, beats: int) -> None:
    # Of one length and in one piece, so that no reader sees half of it.
    os.pwrite(descriptor, json.dumps({"beats": f"{beats:012d}", **asdict(owner)}).encode(), 0)
    os.fsync(descriptor)


def _owner(content: bytes) -> Owner | None:
    try:
        fields = json.loads(content)
        del fields["beats"]
        return Owner(**fields)
    except (ValueError, KeyError, TypeError):
        return None


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]


def _number(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def _newest(directory: Path) -> tuple[int, bytes]:
    """Number and content of the newest file; 0 and nothing if nobody holds the directory."""
    number = 0
    try:
        path = max(_files(directory), key=_number, default=None)
        if path is None:
            return 0, b""
        number = _number(path)
        return number, path.read_bytes()
    except OSError as error:
        if not _is_missing(error):
            raise
        return number, b""  # released between the two


def _is_missing(error: OSError) -> bool:
    return error.errno in (errno.ENOENT, errno.ESTALE)
